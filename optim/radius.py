"""How track 3's #44 and #46 step: radial brake, floor, a norm that only radial motion changes, cautious decay."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Group, Tensors


def row_sums(params: Tensors, updates: Tensors) -> Tensors:
    """||W_i||^2, ||U_i||^2 and <U_i, W_i> of every row i of every part: [3, rows] in float32 at least."""
    sums = []
    for param, update in zip(params, updates, strict=True):
        wide = torch.promote_types(param.dtype, torch.float32)
        w, u = param.flatten(1).to(wide), update.flatten(1).to(wide)
        sums.append(torch.stack([(x * y).sum(1) for x, y in ((w, w), (u, u), (u, w))]))
    return sums


def radius_step(group: Group, params: Tensors, updates: Tensors, scales: Sequence[float], sums: Tensors) -> None:
    """O = scale U;  c = <O, W> / ||W||^2, and where c < 0, O <- O - brake c W (modded-nanogpt's track 3, #29);
    O_i <- O_i max(1, floor ||W_i|| / ||O_i||), by rows or for the whole (#9; by rows #46);
    r = ||W|| - lr <O, W> / ||W||;  W' = W - lr O;  W' <- W' r / ||W'|| (#29);
    W' <- W' (1 - lr cautious_decay [O W > 0]) (#46).

    ``sums`` are those of ``row_sums`` over all rows of the whole matrix, this part's own first, from which ||W'||
    follows, so that a step needs one all_reduce.
    """
    lr, floor = float(group["lr"]), group["floor"]
    for param, update, scale, (weight, square, product) in zip(params, updates, scales, sums, strict=True):
        square, product = square * scale**2, product * scale
        whole = weight.sum()
        outward = group["brake"] * (product.sum() / whole.clamp_min(1e-12)).clamp_max(0)
        square = (square - 2 * outward * product + outward.square() * weight).clamp_min(0)
        product = product - outward * weight
        lengths = (weight, square) if group["floor_rows"] else (whole, square.sum())
        sizes, steps = (x.sqrt().clamp_min(1e-8) for x in lengths)
        lifted = (floor * sizes / steps).clamp(1, torch.finfo(param.dtype).max).expand_as(weight)
        radius, product = whole.sqrt().clamp_min(1e-8), (lifted * product).sum()
        moved = (whole - 2 * lr * product + lr**2 * (lifted.square() * square).sum()).clamp_min(0).sqrt()
        back = (radius - lr * product / radius).clamp_min(1e-8) / moved.clamp_min(1e-8)
        _move(group, param, update, scale, outward, lifted[: len(param)], back)


def _move(
    group: Group, param: Tensor, update: Tensor, scale: float, outward: Tensor, lifted: Tensor, back: Tensor
) -> None:
    rows, dtype = (-1, *[1] * (param.ndim - 1)), param.dtype
    step = (update * scale).sub_(param * outward.to(dtype)).mul_(lifted.to(dtype).view(rows))
    shrinks = (step * param).gt_(0)
    param.sub_(step, alpha=float(group["lr"])).mul_(back.to(dtype))
    if group["cautious_decay"]:
        param.mul_(1 - shrinks * (float(group["lr"]) * group["cautious_decay"]))
