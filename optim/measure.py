"""Sums over whole blocks, for ``apply``: each rank sums over its parts, one small all_reduce a bucket adds them up."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Group, Tensors


@dataclass
class Part:
    """What a rank holds of one block, and may be nothing: rows ``first`` to ``first + rows`` of its fan-out, which is
    ``fan_out`` in all; ``cut`` if other ranks hold more of it, ``rows_cut`` if they hold more of the same rows."""

    first: int
    rows: int
    fan_out: int
    cut: bool
    rows_cut: bool


@dataclass
class Batch:
    """What ``measure`` and ``apply`` get of one group: lists with an entry a parameter, or a part of a block."""

    group: Group
    params: Tensors
    updates: Tensors
    scales: list[float]
    states: list[dict[str, Tensor]]
    parts: list[Part] = field(default_factory=list)  # none where entries are parameters
    sums: Tensors = field(default_factory=list)
    all_rows: bool = False  # whether sums over rows are wanted of all rows, this part's own first


def add_up(batches: list[Batch], all_reduce: Callable[[Tensor], object]) -> None:
    """Sums over this rank's parts become sums over whole blocks; nothing is sent where no part is cut."""
    cut, padded = [], []
    for batch in batches:
        for i, (part, sums) in enumerate(zip(batch.parts, batch.sums, strict=False)):
            if part.rows_cut if sums.ndim > 1 and not batch.all_rows else part.cut:
                cut.append((batch, i))
                padded.append(_padded(part, sums))
    if not cut:
        return
    total = torch.cat([sums.reshape(-1) for sums in padded])
    all_reduce(total)
    pieces = torch.split(total, [sums.numel() for sums in padded])
    for (batch, i), whole, piece in zip(cut, padded, pieces, strict=True):
        part, mine = batch.parts[i], batch.sums[i]
        summed = piece.view(whole.shape).to(mine.dtype)
        if batch.all_rows:
            batch.sums[i] = summed.roll(-part.first, 1)
        else:
            batch.sums[i] = summed if mine.ndim == 1 else summed[:, part.first : part.first + part.rows]


def _padded(part: Part, sums: Tensor) -> Tensor:
    """Sums of a part's rows, among zeros for the block's other rows."""
    if sums.ndim == 1:
        return sums
    padded = sums.new_zeros(len(sums), part.fan_out)
    padded[:, part.first : part.first + part.rows] = sums
    return padded
