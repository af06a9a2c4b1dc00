"""Constraints on the weights that any rule on whole matrices can keep: its setting ``constraint``."""

import torch

from .base import Group, Tensors, check_choice

CONSTRAINTS = ("hyperball",)


def check_constraint(group: Group) -> None:
    """Raises ValueError for one that is unknown, or that leaves another setting without effect."""
    if group["constraint"] is None:
        return
    check_choice(CONSTRAINTS, constraint=group["constraint"])
    if group.get("weight_decay"):
        raise ValueError(
            f"weight_decay={group['weight_decay']} does nothing: constraint={group['constraint']} fixes the norms; "
            "give weight_decay=0"
        )


def norms_and_product(params: Tensors, updates: Tensors) -> Tensors:
    """||W||^2, ||U||^2 and <U, W> of every part, [3] in float32 at least."""
    sums = []
    for param, update in zip(params, updates, strict=True):
        wide = torch.promote_types(param.dtype, torch.float32)
        squares = [torch.linalg.vector_norm(x, dtype=wide).square() for x in (param, update)]
        sums.append(torch.stack([*squares, (update.to(wide) * param).sum()]))
    return sums


def hyperball_step(group: Group, params: Tensors, updates: Tensors, sums: Tensors) -> None:
    """N = W - lr r U / max(||U||, 1e-10);  W <- N r / max(||N||, 1e-10), where r = ||W||, Frobenius norms.

    The norm stays, and the step is lr of it long, whatever the length of U (Wen et al.,
    arXiv 2606.16899; in this form KellerJordan/modded-nanogpt, track 3, record 37, MuonH).

    ||N||^2 follows from the sums: r^2 (1 - 2 lr cos(U, W) + lr^2).  It is at least (1 - lr)^2 r^2, so that nothing
    cancels for steps shorter than the weights, and measuring N itself would round as much.
    """
    lr = float(group["lr"])
    for param, update, (square, update_square, product) in zip(params, updates, sums, strict=True):
        radius, length = square.sqrt(), update_square.sqrt().clamp_min(1e-10)
        step = lr * radius / length
        moved = (square - 2 * step * product + step.square() * update_square).clamp_min(0).sqrt()
        back = radius / moved.clamp_min(1e-10)
        factor = (-step * back).clamp_min(-torch.finfo(param.dtype).max)  # of an update of 0 in float16
        param.mul_(back).addcmul_(update, factor.to(param.dtype))
