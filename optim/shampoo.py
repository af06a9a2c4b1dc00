"""Shampoo (Gupta, Koren and Singer 2018, arXiv 1802.09568), with the practice of Anil et al. (arXiv 2002.09018) and
Shi et al. (arXiv 2309.06497): moving averages, blocks, roots every few steps, grafting."""

from typing import Unpack

import torch
from torch import Tensor

from .base import check_choice, check_count, check_fraction
from .matrix import EngineSettings, Group, MatrixOptimizer, ParamsT
from .roots import check_root, inverse_root, inverse_root_flops, inverse_root_workspace
from .stacks import frobenius_norm

STATISTICS = ("ema", "sum")
GRAFTS = ("none", "adam", "sgd")


class Shampoo(MatrixOptimizer):
    """L <- b2 L + (1-b2) G Gt,  R <- b2 R + (1-b2) Gt G;  M <- b1 M + (1-b1) G;  P = L^-p M R^-p, p = 1/4;
    W <- (1 - lr wd) W - lr P ||graft(M)|| / ||P||.

    Moving averages are divided by 1 - b^t.  Everything lives at the matrix's owner.  With ``betas=(0, 0)``, ``eps=0``
    and ``graft="none"`` the step is lr U Vᵀ of the gradient (roots are then pseudo-inverse).

    Args:
        params: weight matrices; see :class:`MatrixOptimizer`.
        lr: step size; with ``graft="adam"`` as for Adam.
        betas: of the momentum and of the statistics (and of Adam's second moment); each in [0, 1).
        eps: added to the diagonal of L and R before the root; 0 for the pseudo-inverse.
        statistics: ``ema``, or ``sum`` as in the original paper: L <- L + G Gt.
        exponent: p (``None``: 1/4, or 1/2 if ``one_sided``, which give U Vᵀ above).
        one_sided: P = L^-p M for the shorter side alone.
        block: a longer side is cut into the fewest equal parts of at most this length, each block preconditioned and
            grafted alone.
        update_freq: steps between roots.
        early_roots: before that many, roots follow steps 1, 2, 4, 8, ..., as the statistics double; else the step is
            the grafted one itself, as Meta's is until its ``start_preconditioning_step``.
        root: ``eigh``, ``newton`` or ``eigh_shift``, see :func:`inverse_root`.
        graft: whose length the step takes: ``adam``, ``sgd`` (that of M) or ``none``.
        graft_eps: eps of the grafted Adam.
        weight_decay: decoupled, multiplied by lr.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.8e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-12,
        statistics: str = "ema",
        exponent: float | None = None,
        one_sided: bool = False,
        block: int = 8192,
        update_freq: int = 10,
        early_roots: bool = True,
        root: str = "eigh",
        graft: str = "adam",
        graft_eps: float = 1e-8,
        weight_decay: float = 0.0,
        **engine: Unpack[EngineSettings],
    ):
        settings = dict(lr=lr, betas=betas, eps=eps, statistics=statistics, exponent=exponent, root=root)
        settings |= dict(one_sided=one_sided, block=block, update_freq=update_freq, early_roots=early_roots)
        settings |= dict(graft=graft, graft_eps=graft_eps, weight_decay=weight_decay)
        super().__init__(params, settings, **engine)
        for state in self.state.values():
            for key, value in state.items():  # a matrix whose first gradient comes late is not preconditioned until
                if key.partition(".")[0].endswith("_root"):  # the next roots; names may end with the blocks' size
                    value.diagonal(dim1=-2, dim2=-1).fill_(1)

    def check_group(self, group: Group) -> None:
        check_fraction(betas=group["betas"])
        check_choice(STATISTICS, statistics=group["statistics"])
        check_choice(GRAFTS, graft=group["graft"])
        check_count(update_freq=group["update_freq"], block=group["block"])
        check_root(_exponent(group), group["eps"], group["root"])

    def owner_state(self, group: Group, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        k, m, n = shape
        (down, rows), (along, cols) = _cut(m, group["block"]), _cut(n, group["block"])
        blocks = (k, down * along)
        state: dict[str, tuple[int, ...]] = {}
        for side in _sides(group, m, n):
            size = rows if side == "left" else cols
            state |= {side: (*blocks, size, size), f"{side}_root": (*blocks, size, size)}
        if group["betas"][0]:
            state["momentum"] = (*blocks, rows, cols)
        if group["graft"] == "adam":
            state["second_moment"] = (*blocks, rows, cols)
        return state

    def precondition(self, group: Group, stack: Tensor, state: dict[str, Tensor]) -> Tensor:
        _, m, n = stack.shape
        (down, rows), (along, cols) = _cut(m, group["block"]), _cut(n, group["block"])
        sides = _sides(group, m, n)
        grad = stack.to(state[sides[0]].dtype).view(-1, down, rows, along, cols)
        grad = grad.transpose(2, 3).flatten(1, 2)  # [k, blocks, rows, cols]
        for side in sides:
            self._update_statistics(group, side, grad, state)
        beta1 = group["betas"][0]
        momentum = state["momentum"].lerp_(grad, 1 - beta1) / (1 - beta1 ** group["step"]) if beta1 else grad
        grafted = self._grafted(group, momentum, grad, state)
        if group["early_roots"] or group["step"] >= group["update_freq"]:
            update = state["left_root"] @ momentum if "left" in sides else momentum
            update = update @ state["right_root"] if "right" in sides else update
            if group["graft"] != "none":
                floor = torch.finfo(update.dtype).tiny
                update = update * (frobenius_norm(grafted) / frobenius_norm(update).clamp_min(floor))
        else:
            update = grafted
        return update.view(-1, down, along, rows, cols).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _update_statistics(self, group: Group, side: str, grad: Tensor, state: dict[str, Tensor]) -> None:
        beta2, step = group["betas"][1], group["step"]
        factors = (grad, grad.mT) if side == "left" else (grad.mT, grad)
        correction = 1.0
        if group["statistics"] == "ema":
            state[side].lerp_(torch.matmul(*factors), 1 - beta2)
            correction = 1 - beta2**step
        else:
            state[side].add_(torch.matmul(*factors))
        early = group["early_roots"] and step < group["update_freq"] and step.bit_count() == 1
        if step % group["update_freq"] == 0 or early:
            root = inverse_root(state[side] / correction, _exponent(group), group["eps"], group["root"])
            state[f"{side}_root"].copy_(root)

    def _grafted(self, group: Group, momentum: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The step whose length is taken."""
        if group["graft"] != "adam":
            return momentum
        beta2 = group["betas"][1]
        second = state["second_moment"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        least = torch.finfo(second.dtype).tiny ** 0.5  # a gradient of 0 may be divided by it
        root = (second / (1 - beta2 ** group["step"])).sqrt_().add_(group["graft_eps"] or least)
        step: Tensor = momentum / root
        return step

    def flops(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        (down, rows), (along, cols) = (_cut(size, group["block"]) for size in shape)
        sides = [rows if side == "left" else cols for side in _sides(group, *shape)]
        products = sum(2 * 2 * size * rows * cols for size in sides)  # statistics, preconditioning
        roots = sum(inverse_root_flops(size, group["root"]) for size in sides)
        return float(down * along * (products + roots / group["update_freq"]))

    def workspace(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        wide = torch.promote_types(dtype, torch.float32)
        (down, rows), (along, cols) = (_cut(size, group["block"]) for size in shape)
        largest = max(rows if side == "left" else cols for side in _sides(group, *shape))
        roots = down * along * (inverse_root_workspace(largest, group["root"], wide) + wide.itemsize * largest**2)
        matrix = float(wide.itemsize * shape[0] * shape[1])
        return max(roots, 4 * matrix) + 2 * matrix  # new roots, or the update; beside the gradient cut into blocks


def _exponent(group: Group) -> float:
    """p, by default so that the exponents of the sides in use add up to 1/2, as in U Vᵀ = (G Gᵀ)^(-1/2) G."""
    if group["exponent"] is None:
        return 0.5 if group["one_sided"] else 0.25
    return float(group["exponent"])


def _sides(group: Group, m: int, n: int) -> tuple[str, ...]:
    """Of an m x n matrix, those that are preconditioned."""
    if group["one_sided"]:
        return ("left",) if m <= n else ("right",)
    return ("left", "right")


def _cut(size: int, block: int) -> tuple[int, int]:
    """(number of parts, length of a part) of the fewest equal parts of at most ``block``."""
    parts = next(parts for parts in range(-(-size // block), size + 1) if size % parts == 0)
    return parts, size // parts
