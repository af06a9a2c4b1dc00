"""QK-clip: heads whose attention logits have grown too large are scaled down after a step (arXiv 2507.20534)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .base import local
from .regions import local_region


@torch.no_grad()
def qk_clip(queries: Iterable[Tensor], keys: Iterable[Tensor], largest: Tensor, tau: float) -> None:
    """gamma_h = min(1, tau / S_h);  W_q <- sqrt(gamma_h) W_q and W_k <- sqrt(gamma_h) W_k in the rows of head h: its
    logits of the same inputs are then tau at most.  Kimi Team 2025, section 2.1, where tau is 100.

    Where queries are grouped, a key's head takes the smallest factor of its group, and the queries the rest of theirs.
    Momentum and other state stay.  For queries and keys that are not normalised: a norm would undo it.

    Args:
        queries: weight (heads * d, n) of a layer, and its bias (heads * d) if it has one; plain, or DTensors of any
            placement.
        keys: the same, (heads or fewer that divide them) * d.
        largest: [heads], S_h: the largest logit of the forward passes of this step, over all ranks.
        tau: above 0.

    Raises:
        ValueError: ``largest`` does not fit the rows.
    """
    queries, keys = list(queries), list(keys)
    heads, rows, shared = len(largest), len(queries[0]), len(keys[0])
    kept = shared * heads // max(1, rows)  # heads of keys
    if not heads or not kept or rows % heads or heads % kept or kept * (rows // heads) != shared:
        raise ValueError(f"largest of {heads} heads does not fit queries of {rows} rows and keys of {shared}")
    gamma = tau / largest.clamp_min(tau)
    root = gamma.view(kept, -1).amin(1).sqrt()
    for tensors, factors in ((queries, gamma / root.repeat_interleave(heads // kept)), (keys, root)):
        for tensor in tensors:
            _scale_rows(tensor, factors.repeat_interleave(rows // heads))


def _scale_rows(tensor: Tensor, factors: Tensor) -> None:
    first, last = local_region(tensor)[0]
    mine = factors[first:last].to(tensor.dtype)
    local(tensor).mul_(mine.view(-1, *[1] * (tensor.ndim - 1)))
