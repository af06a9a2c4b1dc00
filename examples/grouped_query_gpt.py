"""A model of one's own, with grouped queries (arXiv 2305.13245) and gated MLPs (arXiv 2002.05202).

    python train.py experiment=smoke model=custom model._target_=examples.grouped_query_gpt.GroupedQueryGPT

What it fulfils: trainer/language_model.py.  Shapes: B sequences, T tokens, H heads of D dimensions, K heads of keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.attention import Mask, attend, document_mask
from trainer.language_model import LanguageModel, ModelConfig, init_tensor, recomputed


@dataclass
class GroupedQueryConfig(ModelConfig):
    family: str = "grouped_query"
    presets: str | None = "tiny"  # optimizers have no presets for this family: take tiny's
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 2
    n_embd: int = 128

    def check(self) -> None:
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise ValueError(f"model.n_head={self.n_head}: give a divisor of n_embd and a multiple of n_kv_head")


class Block(nn.Module):
    def __init__(self, c: GroupedQueryConfig):
        super().__init__()
        self.head_dim = c.n_embd // c.n_head
        self.q, self.o = (nn.Linear(c.n_embd, c.n_embd, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(c.n_embd, c.n_kv_head * self.head_dim, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(c.n_embd, 3 * c.n_embd, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * c.n_embd, c.n_embd, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(c.n_embd, eps=1e-6), nn.RMSNorm(c.n_embd, eps=1e-6)

    def forward(self, x: Tensor, mask: Mask | None, recompute: str) -> Tensor:
        return recomputed(recompute, self.residual, x, mask)

    def residual(self, x: Tensor, mask: Mask | None) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = attend(q, k, v, mask)
        y = self.norm2(x := x + self.o(y.transpose(1, 2).flatten(2)))
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class GroupedQueryGPT(LanguageModel):
    Config = GroupedQueryConfig
    config: GroupedQueryConfig
    recompute = "none"

    def __init__(self, config: GroupedQueryConfig, vocab_size: int, seq_len: int, document_start: int | None = None):
        super().__init__(config, vocab_size, seq_len, document_start)
        self.wte, self.wpe = nn.Embedding(vocab_size, config.n_embd), nn.Embedding(seq_len, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm, self.lm_head = nn.RMSNorm(config.n_embd, eps=1e-6), nn.Linear(config.n_embd, vocab_size, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]  # (B, T, n_embd)
        start, head_dim = self.document_start, self.config.n_embd // self.config.n_head
        mask = None if start is None else document_mask(tokens, start, head_dim)
        for block in self.blocks:
            x = block(x, mask, self.recompute)
        y = self.lm_head(self.norm(x)).flatten(0, 1)
        return F.cross_entropy(y if y.dtype == torch.float64 else y.float(), targets.flatten(), reduction="sum")

    def init_parameter(self, name: str, seed: int) -> Tensor:
        shape = self.get_parameter(name).shape
        std = 0.02 if name.startswith(("wte", "wpe")) else (3 * shape[-1]) ** -0.5
        return torch.ones(shape) if len(shape) == 1 else init_tensor(name, shape, seed, 0.0, std)

    def flops_per_token(self) -> float:
        weights = sum(p.numel() for p in [*self.blocks.parameters(), self.lm_head.weight] if p.ndim == 2)
        return 6.0 * weights + 12.0 * self.config.n_layer * self.config.n_embd * self.seq_len
