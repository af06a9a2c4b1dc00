"""Causal self-attention, its rotary positions and its masks.

Shapes: B sequences, T tokens, C = n_embd channels, H heads of D = C / H dimensions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import document_ids


class Attention(nn.Module):
    """Causal self-attention. q, k, v and o are separate, so that each is a matrix of its own to the optimizer."""

    def __init__(self, n_embd: int, n_head: int, *, bias: bool, qk_norm: bool, scale: float | None):
        super().__init__()
        self.n_head, self.head_dim, self.qk_norm, self.scale = n_head, n_embd // n_head, qk_norm, scale
        self.q, self.k, self.v, self.o = (nn.Linear(n_embd, n_embd, bias=bias) for _ in range(4))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        heads = (*x.shape[:2], self.n_head, self.head_dim)
        q, k, v = self.q(x).view(heads), self.k(x).view(heads), self.v(x).view(heads)
        if self.qk_norm:
            q, k = F.rms_norm(q, heads[-1:], eps=1e-6), F.rms_norm(k, heads[-1:], eps=1e-6)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None,
            scale=self.scale,
        )  # fmt: skip
        return self.o(y.transpose(1, 2).reshape(x.shape))


def rotation(position: str, head_dim: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, 1, D/2) of the rotary embedding (Su et al. 2021, arXiv 2104.09864), in like's dtype.

    half_rope is the speedrun's: wavelengths from 2π to 2048π, and the other half of the pairs stands still.
    """
    pairs = head_dim // 2
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    if position == "rope":
        frequency = 10000.0 ** -(torch.arange(pairs, dtype=exact, device=like.device) / pairs)
    else:
        frequency = 1024.0 ** -torch.linspace(0, 1, pairs // 2, dtype=exact, device=like.device)
        frequency = F.pad(frequency, (0, pairs - pairs // 2))
    angle = torch.arange(length, dtype=exact, device=like.device)[:, None, None] * frequency
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def same_document(tokens: Tensor, start: int) -> Tensor:
    """Whether query i may see key j: j is not after i, and in its document.  tokens (B, T) → bool (B, 1, T, T)."""
    ids = document_ids(tokens, start)
    return (ids[:, None, :, None] == ids[:, None, None, :]).tril()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of x (B, T, H, D) by the angles of their positions."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
