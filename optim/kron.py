"""PSGD-Kron: a Kronecker-factored whitening of the gradient, learned by gradient descent (Li, arXiv 1512.04202 and
2402.04553; the matrix case of evanatyourservice/kron_torch)."""

import math
from typing import Unpack

import torch
from torch import Tensor

from .base import check_fraction
from .matrix import EngineSettings, Group, MatrixOptimizer, ParamsT, Tensors

FACTORS = {"left_factor": -2, "right_factor": -1}
ALWAYS, FADING, LEAST = 500, 1000.0, 0.03
"""Factors are updated in each of the first 500 steps, then with a rate that falls by e in 1000 steps, down to 0.03."""


class PSGDKron(MatrixOptimizer):
    """P = QLt QL M^ QRt QR, M^ the momentum without bias;  W <- (1 - lr wd) W - lr P min(1, 1.1 / RMS(P)).

    Before it, in the steps that :func:`factors_due` chooses, with A = QL M^ QRt, B = QL^-t V QR^-1, V ~ N(0, 1) of the
    matrix's shape, and T = A At ∓ B Bt:  QL <- QL - 0.1 triu(T-) QL / ||T+||, a lower bound of the spectral norm; QR
    likewise, of At A and Bt B.  Both are upper triangular; after every hundredth update their largest entries are
    made equal.  V depends on step and shape alone.

    Args:
        params: weight matrices; see :class:`MatrixOptimizer`.
        lr: about a third of AdamW's, the authors say.
        momentum: in [0, 1), on shards.
        weight_decay: decoupled, multiplied by lr.
        precondition_lr: 0.1 above.
        max_dim: a longer side has a diagonal factor.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        precondition_lr: float = 0.1,
        max_dim: int = 8192,
        **engine: Unpack[EngineSettings],
    ):
        settings = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, precondition_lr=precondition_lr)
        super().__init__(params, settings | {"max_dim": max_dim}, **engine)
        for state in self.state.values():
            for factor in (value for key, value in state.items() if key.partition(".")[0] in FACTORS):
                (factor if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1)).fill_(1)

    def check_group(self, group: Group) -> None:
        check_fraction(momentum=group["momentum"])
        if group["max_dim"] < 0 or not 0 <= group["precondition_lr"] <= 1:
            raise ValueError(
                f"max_dim={group['max_dim']}, precondition_lr={group['precondition_lr']}: give a length, and a rate "
                "between 0 and 1"
            )

    def shard_state(self, group: Group, param: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(param, memory_format=torch.preserve_format)}

    def owner_state(self, group: Group, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        sizes = {key: shape[dim] for key, dim in FACTORS.items()}
        return {key: (shape[0], size, size)[: 3 if size <= group["max_dim"] else 2] for key, size in sizes.items()}

    def prepare(self, group: Group, grads: Tensors, states: list[dict[str, Tensor]]) -> Tensors:
        momenta = [state["momentum"] for state in states]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        return list(torch._foreach_div(momenta, 1 - group["momentum"] ** group["step"]))

    def precondition(self, group: Group, stack: Tensor, state: dict[str, Tensor]) -> Tensor:
        left, right = (state[key] for key in FACTORS)
        momentum, due = stack.to(left.dtype), factors_due(group["step"])
        if due:
            noise = torch.Generator(stack.device).manual_seed(group["step"])
            v = torch.randn(stack.shape[1:], generator=noise, device=stack.device, dtype=left.dtype).expand(stack.shape)
            a = _times(right, _times(left, momentum).mT).mT
            b = _solve(right, _solve(left, v).mT).mT
            for factor, x, y in ((left, a, b), (right, a.mT, b.mT)):
                _descend(factor, x, y, group["precondition_lr"])
            if due % 100 == 0:
                _balance(left, right)
        update = _times(left, _times(left, momentum), transposed=True)
        update = _times(right, _times(right, update.mT), transposed=True).mT
        rms: Tensor = update.square().mean((-2, -1), keepdim=True).sqrt()
        return update * (1.1 / (rms + 1e-6)).clamp_max(1.0)

    def flops(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        m, n = shape
        dense = [size for size in shape if size <= group["max_dim"]]
        return 8.0 * m * n + sum(4 * size * m * n + LEAST * (7 * size * m * n + 2 * size**3) for size in dense)

    def workspace(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return wide * (5.0 * shape[0] * shape[1] + 3.0 * max(shape) ** 2)


def factors_due(step: int) -> int:
    """How many updates of the factors there have been after this one of step ``step``, from 1; 0 if it has none."""

    def total(steps: int) -> int:
        if steps <= ALWAYS:
            return steps
        fading = -FADING * math.log(LEAST)
        later = min(steps - ALWAYS, fading)
        rest = LEAST * max(0.0, steps - ALWAYS - fading)
        return int(ALWAYS + FADING * (1 - math.exp(-later / FADING)) + rest)

    return total(step) if total(step) > total(step - 1) else 0


def _times(factor: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """Q x or Qᵀ x, of a triangular Q [k, m, m] or a diagonal one [k, m]."""
    if factor.ndim == 2:
        return factor.unsqueeze(-1) * x
    return (factor.mT if transposed else factor) @ x


def _solve(factor: Tensor, x: Tensor) -> Tensor:
    """Q⁻ᵀ x."""
    if factor.ndim == 2:
        return x / factor.unsqueeze(-1)
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, x, upper=False)
    return solved


def _descend(factor: Tensor, a: Tensor, b: Tensor, lr: float) -> None:
    tiny = torch.finfo(factor.dtype).tiny
    if factor.ndim == 2:
        one, two = a.square().sum(-1), b.square().sum(-1)
        factor.sub_(lr * (one - two) * factor / (one + two).amax(-1, keepdim=True).clamp_min(tiny))
        return
    one, two = a @ a.mT, b @ b.mT
    length = _norm_lower_bound(one + two).clamp_min(tiny)
    factor.sub_(one.sub_(two).triu_().mul_(lr / length) @ factor)


def _norm_lower_bound(a: Tensor) -> Tensor:
    """Of the spectral norm of symmetric matrices [k, m, m]: ||A x|| for the normalised product x of A and its longest
    row, [k, 1, 1].  Overwrites A."""
    scale = torch.linalg.vector_norm(a, torch.inf, (-2, -1), keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    a.div_(scale)
    longest = torch.linalg.vector_norm(a, dim=-1).argmax(-1).view(-1, 1, 1)
    x = a.take_along_dim(longest, -2) @ a
    x = x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    bound: Tensor = scale * (x @ a).norm(dim=-1, keepdim=True)
    return bound


def _balance(*factors: Tensor) -> None:
    """Give the factors of each matrix the same largest entry, and their product as before."""
    largest = [factor.abs().flatten(1).amax(-1) for factor in factors]
    mean = torch.stack(largest).prod(0).sqrt()
    for factor, size in zip(factors, largest, strict=True):
        factor.mul_((mean / size).view(-1, *[1] * (factor.ndim - 1)))
