"""GPT (its attention is in attention.py): GPT-2 exactly, and the variants of it that the NanoGPT speedrun made popular.

What the trainer asks of this and of any model: `LanguageModel` in language_model.py.
Shapes: B sequences, T tokens, C = n_embd channels, H heads of D = C / H dimensions, V tokens in the vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from data import IGNORE_INDEX
from trainer.attention import Attention, KVCache, Mask, document_mask, mask_after, rotation
from trainer.initial import INITS, initial_value
from trainer.language_model import LanguageModel, ModelConfig, recomputed

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": partial(F.gelu, approximate="tanh"),
    "gelu_erf": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass
class GPTConfig(ModelConfig):
    """The settings of GPT. Defaults are those of configs/model/tiny.yaml."""

    name: str = "tiny"
    family: str = "tiny"
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    position: str = "learned"  # learned | rope | half_rope (half of the dimensions of a head do not rotate)
    norm: str = "rmsnorm"  # layernorm | rmsnorm
    norm_eps: float | None = 1e-6  # of RMS norms; null: the machine epsilon of what is normalised, torch's default
    activation: str = "relu2"  # gelu (its tanh form, as in GPT-2) | gelu_erf | relu2
    tied: bool = False  # output head = token embedding
    bias: bool = False  # in the linear layers, the LayerNorms and an untied head
    embed_norm: bool = False  # normalise the embedding before the first block
    qk_norm: bool = False  # RMS-normalise queries and keys per head
    attention_scale: float | None = None  # of the scores; null: 1/sqrt(head dimension)
    softcap: float | None = None  # logits never exceed ± this
    padded_softmax: bool = False  # the vocabulary's padding takes part in the softmax, and is learned to be improbable
    init: str = "fan_in"  # gpt2 | fan_in | torch | muonh | soap_muon: see initial.py
    zero_init_proj: bool = False  # attention output, MLP output and an untied head start at zero
    loss_chunk: int = 8192  # tokens whose logits exist at once
    param: str = "standard"  # standard | mup: what n_embd changes beside the shapes, see schedules/mup.py
    base_width: int | None = None  # with mup: the n_embd at which both are the same, that of the tuned learning rates
    base_head_dim: int | None = None  # with mup: n_embd/n_head there; null: as here, so that heads grow in number

    def check(self) -> None:
        choices = {
            "position": ("learned", "rope", "half_rope"),
            "norm": ("layernorm", "rmsnorm"),
            "activation": tuple(ACTIVATIONS),
            "init": INITS,
            "param": ("standard", "mup"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"model.{key}={getattr(self, key)} is unknown: choose one of {', '.join(allowed)}")
        for key in ("n_layer", "n_head", "n_embd", "loss_chunk", "base_width", "base_head_dim"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be at least 1")
        if self.n_head > self.n_embd:
            raise ValueError(f"model.n_head={self.n_head} is more heads than model.n_embd={self.n_embd} dimensions: "
                             "lower n_head or raise n_embd")  # fmt: skip
        if self.n_embd % self.n_head:
            near = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0 and h <= 2 * self.n_head][-4:]
            raise ValueError(f"model.n_head={self.n_head} does not divide model.n_embd={self.n_embd}: "
                             f"choose a divisor, for example {', '.join(map(str, near))}")  # fmt: skip
        quantum = {"learned": 1, "rope": 2, "half_rope": 4}[self.position]
        if self.head_dim % quantum:
            raise ValueError(f"model.position={self.position} needs a head dimension that {quantum} divides, but "
                             f"n_embd/n_head = {self.head_dim}: change model.n_head or model.n_embd")  # fmt: skip
        for key in ("softcap", "attention_scale", "norm_eps"):
            if getattr(self, key) is not None and not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"model.{key}={getattr(self, key)} must be positive and finite, or null for none")
        if self.param == "mup" and self.base_width is None:
            raise ValueError("model.base_width=null: with model.param=mup give the n_embd of the tuned learning rates")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def width_ratio(self) -> float:
        return self.n_embd / self.base_width if self.param == "mup" and self.base_width else 1.0

    @property
    def score_scale(self) -> float | None:
        """Of attention's scores, None for 1/sqrt(d); under muP it falls as 1/d (arXiv 2203.03466, definition 4.1)."""
        base = self.base_head_dim if self.param == "mup" else None
        return self.attention_scale if base is None else (self.attention_scale or base**-0.5) * base / self.head_dim

    def activation_bytes(self, seq_len: int, width: int) -> int:
        """A transformer layer keeps about 34 bytes per token and dimension in 16 bit with fused attention (Korthikanti
        et al., arXiv 2205.05198, section 4.1)."""
        return 17 * width * seq_len * self.n_embd * self.n_layer


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the channels, with a gain."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.layernorm, self.eps = config.norm == "layernorm", config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias and self.layernorm else None

    def forward(self, x: Tensor) -> Tensor:
        if self.layernorm:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.activation(self.fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1 = Norm(config)
        self.attn = Attention(
            config.n_embd, config.n_head, bias=config.bias, qk_norm=config.qk_norm, norm_eps=config.norm_eps,
            scale=config.score_scale,
        )  # fmt: skip
        self.norm2, self.mlp = Norm(config), MLP(config)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Mask | None, recompute: str = "none",
        cache: KVCache | None = None,
    ) -> Tensor:  # fmt: skip
        # In here, and not around the block, so that recomputation gathers no shards again and is compiled as well.
        return recomputed(recompute, self.residual, x, rotation, mask, cache)

    def residual(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Mask | None, cache: KVCache | None = None
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), rotation, mask, cache)
        return x + self.mlp(self.norm2(x))


class ChunkLoss(nn.Module):
    """The head and its loss on a part of the tokens; a module, so that it compiles in place. It owns no parameters."""

    def __init__(self, vocab_size: int, softcap: float | None, classes: int):
        """classes: how many of the padded logits the softmax is over."""
        super().__init__()
        self.vocab_size, self.softcap, self.classes = vocab_size, softcap, classes

    def forward(self, x: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, reduction: str) -> Tensor:
        """x (N, C), targets (N,) int64, weight (padded V, C), bias (padded V,) → the sum of N losses, or each."""
        logits = self.capped(F.linear(x, weight, bias)[..., : self.classes])
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction=reduction)

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Channels (…, C) → logits (…, V) in at least float32."""
        return self.capped(F.linear(x, weight, bias)[..., : self.vocab_size])

    def capped(self, x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        # A smooth cap as in the speedrun's track 3: slope 1 at zero, ± softcap at infinity, cheaper than tanh.
        return x if self.softcap is None else x * torch.rsqrt(1 + (x / self.softcap).square())


class LossByChunks(torch.autograd.Function):
    """The sum of ChunkLoss over chunks of the tokens, with its gradients at once: only one chunk's logits exist, and
    none are computed twice."""

    @staticmethod
    def forward(ctx: Any, loss: ChunkLoss, size: int, x: Tensor, targets: Tensor, *head: Tensor | None) -> Tensor:
        """size: tokens of a chunk; x (N, C), targets (N,) and head as ChunkLoss takes them."""
        weights = [w if w is None else w.detach().requires_grad_() for w in head]
        parts, losses = x.detach().split(size), []
        with torch.enable_grad():
            for part, chosen in zip(parts, targets.split(size), strict=True):
                losses.append(loss(part.requires_grad_(), chosen, *weights, "sum"))
                losses[-1].backward()  # gradients of the head add up
        ctx.save_for_backward(torch.cat([p.grad for p in parts]), *(w if w is None else w.grad for w in weights))
        return torch.stack(losses).detach().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *head = (g if g is None else g * grad for g in ctx.saved_tensors)
        return None, None, x, None, *head


class GPT(LanguageModel):
    """A causal language model.

    Parameters: `wte` (padded V, C), `wpe` (seq_len, C) where positions are learned, `blocks`, `norm`, and `lm_head`
    (padded V, C) unless the head is tied to `wte`. Inside, the vocabulary is padded to a multiple of 128; the padding
    starts at zero, is never predicted and never receives a gradient, but with `padded_softmax` it is as any token.
    """

    Config = GPTConfig
    config: GPTConfig
    recompute = "none"

    def __init__(self, config: GPTConfig, vocab_size: int, seq_len: int, document_start: int | None = None):
        super().__init__(config, vocab_size, seq_len, document_start)
        self.padded_vocab = 128 * math.ceil(vocab_size / 128)
        self.wte = nn.Embedding(self.padded_vocab, config.n_embd)
        self.wpe = nn.Embedding(seq_len, config.n_embd) if config.position == "learned" else None
        self.embed_norm = Norm(config) if config.embed_norm else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = Norm(config)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, self.padded_vocab, bias=config.bias)
        self.loss = ChunkLoss(vocab_size, config.softcap, self.padded_vocab if config.padded_softmax else vocab_size)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: list[KVCache] | None = None,
        logits_to_keep: int = 0, reduction: str = "sum",
    ) -> Tensor:  # fmt: skip
        """tokens (B, T) int64 → logits (B, T, V); with targets (B, T) → the sum of the tokens' losses, in nats.

        With a cache, of `new_cache`, the tokens go on after those before. logits_to_keep: of the last alone; 0: of all.

        The sum, float32 (float64 for float64 weights), leaves out targets of -100; reduction="none": the losses (B, T).
        At most `config.loss_chunk` tokens have logits at a time, in the forward and in the backward pass.
        Raises ValueError where T exceeds the learned positions.
        """
        start = 0 if cache is None else cache[0].length
        x = self.embed(tokens, start)
        at = self.config.position, self.config.head_dim, tokens.shape[1]
        turn = rotation(*at, x, start) if self.wpe is None else None
        mask: Mask | None = None
        if cache is not None:
            mask = mask_after(tokens, start, self.document_start, cache[-1])
        elif self.document_start is not None:
            mask = document_mask(tokens, self.document_start, self.config.head_dim)
        for i, block in enumerate(self.blocks):
            x = block(x, turn, mask, self.recompute, None if cache is None else cache[i])
        x = self.norm(x)
        x = x / r if (r := self.config.width_ratio) != 1 else x  # muP's output multiplier
        if targets is None:
            return self.logits(x[:, -logits_to_keep:])
        x, targets, head, size = x.flatten(0, 1), targets.flatten(), self.output(), self.config.loss_chunk
        if len(x) > size and x.requires_grad:
            return LossByChunks.apply(self.loss, size, x, targets, *head)
        losses = [self.loss(*p, *head, reduction) for p in zip(x.split(size), targets.split(size), strict=True)]
        return sum(losses) if reduction == "sum" else torch.cat(losses).view(tokens.shape)

    def new_cache(self, room: int) -> list[KVCache]:
        """For generation of up to `room` tokens: a cache for every block, and one of document ids."""
        return [KVCache(room) for _ in range(len(self.blocks) + 1)]

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        x = self.wte(tokens)
        if self.wpe is not None:
            end = start + tokens.shape[1]
            if end > self.seq_len:
                raise ValueError(f"a sequence of {end} tokens, but the model has {self.seq_len} positions")
            x = x + self.wpe.weight[start:end]
        return x if self.embed_norm is None else self.embed_norm(x)

    def output(self) -> tuple[Tensor, Tensor | None]:
        """Weight (padded V, C) and bias (padded V,) of the head."""
        return (self.wte.weight, None) if self.lm_head is None else (self.lm_head.weight, self.lm_head.bias)

    def logits(self, x: Tensor) -> Tensor:
        return self.loss.logits(x, *self.output())

    def init_parameter(self, name: str, seed: int) -> Tensor:
        """The whole initial value of one parameter, float32 on the CPU: a function of (seed, name) alone; see
        ``initial_value``."""
        shape = self.get_parameter(name).shape
        value = initial_value(self.config, name, shape, seed)
        if name.partition(".")[0] in ("wte", "lm_head") and not self.config.padded_softmax:
            value[self.vocab_size :] = 0
        return value

    def modules_to_compile(self) -> list[nn.Module]:
        return [*self.blocks, self.loss]

    def flops_per_token(self) -> float:
        """By the convention of PaLM's appendix B (arXiv 2204.02311): 6 per weight of a matrix product (the head is one,
        embedding look-ups are none) plus 12·L·C·T for attention's scores and their use, causality not deducted,
        recomputation not counted."""
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2) + self.vocab_size * self.config.n_embd
        return 6.0 * weights + 12.0 * self.config.n_layer * self.config.n_embd * self.seq_len
