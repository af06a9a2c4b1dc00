"""SOAP: Adam in the eigenbasis of Shampoo's statistics (Vyas et al. 2024, arXiv 2409.11321, algorithm 3)."""

from typing import Unpack

import torch
from torch import Tensor

from .base import check_count, check_fraction
from .matrix import EngineSettings, Group, MatrixOptimizer, ParamsT
from .roots import eigh

SIDES = {"left": -2, "right": -1}


class SOAP(MatrixOptimizer):
    """L <- b2 L + (1-b2) G Gt,  R <- b2 R + (1-b2) Gt G, with eigenvectors QL, QR;  Adam on QLt G QR;  back by QL, QRt.

    Everything lives at the matrix's owner.  The first step only initialises the bases (eigh).  Later, after every
    ``update_freq``-th update, a basis becomes QR(L Q), one power iteration, with its columns and the second moment
    sorted by the estimated eigenvalues diag(Qt L Q).  The momentum is kept in the bases and rotated with them.

    Args:
        params: weight matrices; see :class:`MatrixOptimizer`.
        lr: as for Adam.
        betas: of the momentum, and of the second moment and statistics; each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled, multiplied by lr.
        update_freq: updates between new bases.
        max_dim: a longer side keeps the identity as its basis.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        update_freq: int = 10,
        max_dim: int = 10000,
        **engine: Unpack[EngineSettings],
    ):
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, settings | dict(update_freq=update_freq, max_dim=max_dim), **engine)
        for state in self.state.values():
            self.initialise(state)

    def initialise(self, state: dict[str, Tensor]) -> None:
        """Set the state of a matrix that does not begin at zero; names may end with the size of their blocks."""
        for key, value in state.items():  # a matrix whose first gradient comes late starts under Adam
            if key.partition(".")[0].endswith("_basis"):
                value.diagonal(dim1=-2, dim2=-1).fill_(1)

    def check_group(self, group: Group) -> None:
        check_fraction(betas=group["betas"])
        check_count(update_freq=group["update_freq"])
        if group["max_dim"] < 0:
            raise ValueError(f"max_dim={group['max_dim']}: give a length, or 0 for no basis at all")

    def owner_state(self, group: Group, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        state: dict[str, tuple[int, ...]] = {"momentum": shape, "second_moment": shape}
        for side, dim in SIDES.items():
            size = shape[dim]
            if size <= group["max_dim"]:
                state |= {side: (shape[0], size, size), f"{side}_basis": (shape[0], size, size)}
        return state

    def precondition(self, group: Group, stack: Tensor, state: dict[str, Tensor]) -> Tensor:
        grad = stack.to(state["momentum"].dtype)
        updates = group["step"] - 1
        update = self._adam(group, grad, state, updates) if updates else torch.zeros_like(grad)
        for side, x in self.factors(group, grad, state).items():
            if side not in state:
                continue
            state[side].lerp_(x @ x.mT, 1 - group["betas"][1])
            if updates == 0:
                state[f"{side}_basis"].copy_(eigenbasis(x))
            elif updates % group["update_freq"] == 0:
                change, momentum = power_iteration(state, side), state["momentum"]
                momentum.copy_(change.mT @ momentum if side == "left" else momentum @ change)
        return update

    def factors(self, group: Group, grad: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """For each side, the X whose X Xᵀ its statistic averages."""
        return {"left": grad, "right": grad.mT}

    def _adam(self, group: Group, grad: Tensor, state: dict[str, Tensor], updates: int) -> Tensor:
        beta1, beta2 = group["betas"]
        left, right = state.get("left_basis"), state.get("right_basis")
        grad = project(grad, left, right)
        momentum = state["momentum"].lerp_(grad, 1 - beta1)
        second = state["second_moment"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        least = torch.finfo(second.dtype).tiny ** 0.5  # a gradient of 0 may be divided by it
        root = (second / (1 - beta2**updates)).sqrt_().add_(group["eps"] or least)
        update = (momentum / (1 - beta1**updates)).div_(root)
        return project(update, left if left is None else left.mT, right if right is None else right.mT)

    def flops(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        m, n = shape
        total = 12.0 * m * n  # Adam
        for size in shape:
            if size <= group["max_dim"]:  # statistics, there and back; power iteration, QR, momentum
                total += 3 * 2 * size * m * n + (2 * size**3 + 4 * size**3 + 4 * size * m * n) / group["update_freq"]
        return total

    def workspace(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        wide = torch.promote_types(dtype, torch.float32).itemsize
        largest = max((size for size in shape if size <= group["max_dim"]), default=0)
        return 4.0 * wide * (largest**2 + shape[0] * shape[1])  # new bases, or the update


def project(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """leftᵀ x right, where a missing basis is the identity."""
    x = x if left is None else left.mT @ x
    return x if right is None else x @ right


def eigenbasis(x: Tensor) -> Tensor:
    """Eigenvectors of x xᵀ, largest eigenvalue first, for x [k, m, n].

    Where m > n, eigenvectors of the eigenvalue 0 are a matter of choice: eigh's would hang on rounding, and so on the
    number of ranks; the orthogonal complement that QR gives is a smooth function of x.
    """
    if x.shape[-2] <= x.shape[-1]:
        return eigh(x @ x.mT)[1].flip(-1)
    complete, triangle = torch.linalg.qr(x, mode="complete")
    rank = x.shape[-1]
    span = complete[..., :rank] @ eigenbasis(triangle[..., :rank, :])
    return torch.cat([span, complete[..., rank:]], -1)


def power_iteration(state: dict[str, Tensor], side: str) -> Tensor:
    """One step towards the eigenvectors of ``state[side]``, which reorders the second moment; returns what takes the
    old basis to the new one."""
    basis, dim = state[f"{side}_basis"], SIDES[side]
    power = state[side] @ basis
    order = (basis * power).sum(-2).argsort(dim=-1, descending=True, stable=True)
    rotated = torch.linalg.qr(power.take_along_dim(order.unsqueeze(-2), -1)).Q
    second = state["second_moment"]
    second.copy_(second.take_along_dim(order.unsqueeze(-1 if dim == -2 else -2), dim))
    if (values := state.get(f"{side}_eigenvalues")) is not None:
        values.copy_(values.take_along_dim(order, -1))
    change: Tensor = basis.mT @ rotated
    basis.copy_(rotated)
    return change
