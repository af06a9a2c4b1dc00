"""Text from a language model: one token after another, drawn from what it predicts.

Shapes: B texts side by side, T tokens, V tokens in the vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from common import UserError
from data.tokenizer import Tokenizer
from trainer.language_model import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. The settings apply in this order, as in transformers: the same seed draws the same there.

    Raises UserError: a setting is out of range.
    """

    temperature: float = 0.8  # divides the logits; 0: always the likeliest token
    top_k: int | None = None  # only the k likeliest
    top_p: float | None = None  # only the likeliest that together have this probability

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}: give 0, for the likeliest token, or a number above it")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: give at least 1, or leave it out for the whole vocabulary")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: give a probability above 0, at most 1")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """logits (B, V) → a token of each row, (B,)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p is not None:
            ascending, order = logits.sort()
            unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            unlikely[:, -1] = False
            logits = logits.masked_fill(unlikely.scatter(1, order, unlikely), float("-inf"))
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(
    model: LanguageModel, prompt: Tensor, count: int, sampling: Sampling, seed: int = 0, stop: int | None = None,
    room: int | None = None, cached: bool = True,
) -> Iterator[Tensor]:  # fmt: skip
    """The next tokens of every text: (B,) int64 on the CPU, at most `count` times, until all texts have had `stop`.

    Tokens are drawn on the CPU, from a generator of their own. Where the text outgrows the model's window, the older
    half of the window is left behind.

    Args:
        model: in evaluation mode; every rank of a sharded one calls alike.
        prompt: (B, T) int64 with T ≥ 1, on the model's device.
        room: tokens that the model sees at once; default: its `seq_len`.
        cached: keep the keys and values of earlier tokens, where the model can.
    """
    generator, tokens, first = torch.Generator().manual_seed(seed), prompt, 0
    room = room or model.seq_len
    done = torch.zeros(len(prompt), dtype=torch.bool)
    new_cache = getattr(model, "new_cache", None)  # GPT has one, and leaves out logits that nobody reads
    forward: Callable[..., Tensor] = partial(model, logits_to_keep=1) if new_cache else model
    cache = None
    for _ in range(count):
        if tokens.shape[1] - first > room:
            first, cache = tokens.shape[1] - max(1, room // 2), None
        if new_cache and cached:
            fresh = tokens[:, first:] if cache is None else tokens[:, -1:]
            cache = new_cache(room) if cache is None else cache
            logits = forward(fresh, cache=cache)
        else:
            logits = forward(tokens[:, first:])
        drawn = sampling.draw(logits[:, -1].cpu(), generator)
        yield drawn
        done |= drawn == stop
        if done.all():
            return
        tokens = torch.cat([tokens, drawn[:, None].to(tokens.device)], 1)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's tokens as the beginning of a document."""
    return [tokenizer.eos, *tokenizer.encode(prompt)]


def printable(text: str) -> str:
    """The text without the control characters that a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def complete(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, count: int, sampling: Sampling, seed: int = 0,
    texts: int = 1,
) -> list[str]:  # fmt: skip
    """The prompt with what the model goes on with, up to the end of the document; in so many texts."""
    device = next(model.parameters()).device
    tokens = torch.tensor([encode_prompt(tokenizer, prompt)] * texts, device=device)
    drawn = torch.stack(list(generate(model, tokens, count, sampling, seed)), 1).tolist()
    ends = [row.index(tokenizer.eos) if tokenizer.eos in row else count for row in drawn]
    return [prompt + tokenizer.decode(row[:end]) for row, end in zip(drawn, ends, strict=True)]
