"""Causal self-attention, its rotary positions and its masks.

Shapes: B sequences, T tokens, C = n_embd channels, H heads of D = C / H dimensions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from data import document_ids

Mask = Tensor | BlockMask


class KVCache:
    """What one layer keeps of the tokens that it has read, (B, T, …) each: its keys and values, for generation."""

    def __init__(self, room: int):
        """room: tokens that it can hold."""
        self.room, self.length, self.kept = room, 0, list[Tensor]()

    def append(self, *new: Tensor) -> list[Tensor]:
        """Keep the new tokens' tensors (B, T, …); returns those of all tokens so far."""
        if not self.kept:
            self.kept = [x.new_empty(x.shape[0], self.room, *x.shape[2:]) for x in new]
        before, self.length = self.length, self.length + new[0].shape[1]
        for kept, x in zip(self.kept, new, strict=True):
            kept[:, before : self.length] = x
        return [kept[:, : self.length] for kept in self.kept]


class Attention(nn.Module):
    """Causal self-attention. q, k, v and o are separate, so that each is a matrix of its own to the optimizer."""

    def __init__(self, n_embd: int, n_head: int, *, bias: bool, qk_norm: bool, norm_eps: float | None,
                 scale: float | None):  # fmt: skip
        super().__init__()
        self.n_head, self.head_dim, self.qk_norm = n_head, n_embd // n_head, qk_norm
        self.norm_eps, self.scale = norm_eps, scale
        self.q, self.k, self.v, self.o = (nn.Linear(n_embd, n_embd, bias=bias) for _ in range(4))
        self.largest: Tensor | None = None

    def note_largest(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """From now on passes in training raise this, (H,), to the largest score of every head."""
        self.largest = torch.zeros(self.n_head, device=device, dtype=dtype)
        return self.largest

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Mask | None, cache: KVCache | None = None
    ) -> Tensor:
        heads = (*x.shape[:2], self.n_head, self.head_dim)
        q, k, v = (y.view(heads) for y in outputs(x, self.q, self.k, self.v))
        if self.qk_norm:
            q, k = (F.rms_norm(x, heads[-1:], eps=self.norm_eps) for x in (q, k))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.append(k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.largest is not None and self.training:
            self.largest.copy_(torch.maximum(self.largest, largest_scores(q, k, mask, self.scale)))
        y = attend(q, k, v, mask, scale=self.scale)
        return self.o(y.transpose(1, 2).reshape(x.shape))


def outputs(x: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
    """What each layer makes of x (…, C)."""
    if not as_one_product(x):
        return [layer(x) for layer in layers]
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return F.linear(x, weight, bias).split([layer.out_features for layer in layers], -1)


def as_one_product(x: Tensor) -> bool:
    """A GPU has one large product done before three small ones, forward and backward.  A CPU gains less than the sum of
    three gradients being rounded otherwise is worth."""
    return x.is_cuda


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None = None) -> Tensor:
    """Attention of queries (B, H, T, D) to keys and values (B, K, S, D), where K divides H; causal without a mask."""
    gqa = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        return _compiled(flex_attention)(q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa)
    causal = mask is None and q.shape[2] == k.shape[2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa)


@torch.no_grad()
def largest_scores(q: Tensor, k: Tensor, mask: Mask | None, scale: float | None = None) -> Tensor:
    """Each head's largest score (H,) that the mask lets through, of queries and keys (B, H, T, D); by blocks of
    queries, so that no T × T scores exist at once."""
    found, (batch, _, length, head_dim), device = [], q.shape, q.device
    example = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    for start in range(0, length, 128):
        end = min(start + 128, length)
        query, key = torch.arange(start, end, device=device)[:, None], torch.arange(end, device=device)
        if isinstance(mask, BlockMask):
            visible = mask.mask_mod(example, torch.zeros_like(key), query, key)
        else:
            visible = query >= key if mask is None else mask[:, :, start:end, :end]
        scores = q[:, :, start:end] @ k[:, :, :end].mT
        found.append(scores.masked_fill(~visible, -torch.inf).amax((0, 2, 3)))
    return torch.stack(found).amax(0) * (head_dim**-0.5 if scale is None else scale)


def rotation(position: str, head_dim: int, length: int, like: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, 1, D/2) of the rotary embedding (Su et al. 2021, arXiv 2104.09864) of the T = length
    positions from start on, in float32 at least, in which `rotate` computes too: bfloat16 would blur far positions.

    half_rope is the speedrun's: wavelengths from 2π to 2048π, and the other half of the pairs stands still.
    """
    pairs = head_dim // 2
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    if position == "rope":
        frequency = 10000.0 ** -(torch.arange(pairs, dtype=exact, device=like.device) / pairs)
    else:
        frequency = 1024.0 ** -torch.linspace(0, 1, pairs // 2, dtype=exact, device=like.device)
        frequency = F.pad(frequency, (0, pairs - pairs // 2))
    angle = torch.arange(start, start + length, dtype=exact, device=like.device)[:, None, None] * frequency
    return angle.cos(), angle.sin()


def same_document(tokens: Tensor, start: int) -> Tensor:
    """Whether query i may see key j: j is not after i, and in its document.  tokens (B, T) → bool (B, 1, T, T)."""
    ids = document_ids(tokens, start)
    return (ids[:, None, :, None] == ids[:, None, None, :]).tril()


def document_mask(tokens: Tensor, start: int, head_dim: int) -> Mask:
    """As `same_document`, for `attend`: on CUDA without a B × T × T tensor, by blocks of 128 queries and keys."""
    if not has_blocks(tokens, head_dim):
        return same_document(tokens, start)
    ids, (batch, length) = document_ids(tokens, start), tokens.shape

    def visible(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (ids[b, query] == ids[b, key])

    mask: BlockMask = _compiled(create_block_mask)(visible, batch, None, length, length, device=tokens.device)
    return mask


def has_blocks(tokens: Tensor, head_dim: int) -> bool:
    return tokens.is_cuda and head_dim >= 16  # less is too little for FlexAttention's products


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)  # as it is, it would hold what it is here to avoid


def mask_after(tokens: Tensor, before: int, start: int | None, cache: KVCache) -> Tensor | None:
    """As `same_document`, of tokens (B, T) that go on after `before` others, whose document ids the cache keeps: bool
    (…, T, all so far).  None: the usual causal mask, or for a single token everything so far."""
    length = tokens.shape[1]
    if start is None:
        if before == 0 or length == 1:
            return None
        return torch.ones(length, before + length, dtype=torch.bool, device=tokens.device).tril(before)
    ids = document_ids(tokens, start)
    if before:
        ids = ids + cache.kept[0][:, before - 1 : before]
    (everything,) = cache.append(ids)
    return (ids[:, None, :, None] == everything[:, None, None, :]).tril(before)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of x (B, T, H, D) by the angles of their positions."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)
