"""Generated text: the cache changes nothing, and the drawing is that of transformers."""

import pytest
import torch

from common import UserError
from tests.errors import raises_naming
from trainer.evaluate.generate import Sampling, generate
from trainer.model import GPT, GPTConfig
from trainer.parallel import initialise

SHAPE = dict(n_layer=2, n_head=2, n_embd=16)
KINDS = {
    "learned": dict(),
    "rope": dict(position="rope", qk_norm=True, softcap=15.0),
    "half_rope": dict(position="half_rope", attention_scale=0.12, embed_norm=True),
    "gpt2": dict(norm="layernorm", activation="gelu", tied=True, bias=True),
}


def build(start: int | None = None, seq_len: int = 32, scale: float = 2, **settings) -> GPT:
    model = GPT(GPTConfig(**SHAPE, **settings), vocab_size=61, seq_len=seq_len, document_start=start)
    initialise(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():  # or all logits are nearly equal
            parameter.mul_(scale)
    return model.eval()


def texts(batch: int = 3, length: int = 32) -> torch.Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("start", [None, 7], ids=["plain", "document_mask"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_log_probabilities_are_the_uncached(kind, start):
    """A prompt, single tokens, and several at once."""
    tokens = texts()
    tokens[:, 20] = 7
    for dtype, scale, atol in ((torch.float64, 2, 1e-12), (torch.float32, 1, 1e-5)):
        model = build(start, scale=scale, **KINDS[kind]).to(dtype)
        whole, cache = model(tokens).log_softmax(-1), model.new_cache(32)
        parts = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 7), (7, 12), (12, 32))]
        torch.testing.assert_close(torch.cat(parts, 1).log_softmax(-1), whole, rtol=0, atol=atol)
        assert whole.std() > 0.02


@pytest.mark.parametrize("room", [4, 9, 32])
def test_the_window_moves_alike_with_and_without_cache(room):
    """Beyond the window the older half is left behind."""
    model = build(seq_len=room)
    drawn = [torch.stack(list(generate(model, texts(2, 3), 40, Sampling(), seed=3, cached=cached)))
             for cached in (True, False)]  # fmt: skip
    assert drawn[0].shape == (40, 2) and torch.equal(*drawn)


def test_it_stops_where_every_text_has_ended():
    model, prompt = build(), texts(2, 3)
    free = torch.stack(list(generate(model, prompt, 30, Sampling(), seed=3)))
    stop = int(free[4, 0])
    ended = torch.stack(list(generate(model, prompt, 30, Sampling(), seed=3, stop=stop)))
    assert torch.equal(ended, free[: len(ended)])
    first = [(free[:, row] == stop).nonzero() for row in (0, 1)]
    assert len(ended) == (30 if not all(map(len, first)) else max(int(where[0]) for where in first) + 1)


@pytest.mark.parametrize("temperature, top_k, top_p", [(0.8, None, None), (0.5, 5, None), (1, None, 0.7), (1, 20, 0.9)])
def test_tokens_are_drawn_as_in_transformers(temperature, top_k, top_p):
    from transformers.generation import logits_process as hf

    logits = torch.randn(4, 61, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(float(temperature), top_k, top_p)
    theirs = hf.TemperatureLogitsWarper(sampling.temperature)(None, logits)
    theirs = hf.TopKLogitsWarper(sampling.top_k)(None, theirs) if sampling.top_k else theirs
    theirs = hf.TopPLogitsWarper(sampling.top_p)(None, theirs) if sampling.top_p else theirs
    ours = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    for _ in range(20):
        drawn = sampling.draw(logits, ours)
        assert torch.equal(drawn, torch.multinomial(theirs.softmax(-1), 1).squeeze(1))
    assert torch.equal(Sampling(temperature=0).draw(logits, ours), logits.argmax(-1))


def test_settings_out_of_range():
    for key, value in (("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)):
        with raises_naming(UserError, f"{key}={value}", "give"):
            Sampling(**{key: value})
