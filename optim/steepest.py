"""Steepest descent under any norm (Bernstein and Newhouse, "Old Optimizer, New Norm", arXiv 2409.20325)."""

from typing import Unpack

import torch
from torch import Tensor

from .base import check_choice, check_fraction
from .lmo import NORMS, lmo
from .matrix import EngineSettings, Group, MatrixOptimizer, ParamsT, Tensors
from .polar import polar_flops, polar_workspace

FORMS = ("normalised", "regularised")
POLAR_NORMS = ("spectral", "rms_to_rms")  # their oracle is a polar factor


class Steepest(MatrixOptimizer):
    """M <- mu M + (1-mu) G;  W <- (1 - lr wd) W + lr a LMO(M), where LMO minimises <M, X> over the norm's unit ball and
    a = 1 (normalised) or a = ||M||* = -<M, LMO(M)> (regularised).

    ``norm="spectral"`` without momentum is the lecture's last slide: W <- W - lr U Vᵀ.

    Args:
        params: weight matrices (fan_out, fan_in); see :class:`MatrixOptimizer`.
        lr: length of a step in the norm (normalised), or 1 / the smoothness constant (regularised).
        norm: a matrix norm of ``NORMS``.
        form: ``normalised`` or ``regularised``.
        momentum: mu, in [0, 1).
        weight_decay: decoupled, multiplied by lr.
        polar: method of ``POLAR_METHODS`` for the norms that need a polar factor.
        polar_steps: iterations (``None``: the method's default).

    Raises:
        ValueError: a setting out of range or an unknown name.
    """

    half_precision = True
    squares = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        norm: str = "spectral",
        form: str = "normalised",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        polar: str = "polar_express",
        polar_steps: int | None = None,
        **engine: Unpack[EngineSettings],
    ):
        settings = dict(lr=lr, norm=norm, form=form, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, dict(settings, polar=polar, polar_steps=polar_steps), **engine)

    def check_group(self, group: Group) -> None:
        check_choice(NORMS, norm=group["norm"])
        check_choice(FORMS, form=group["form"])
        check_fraction(momentum=group["momentum"])
        polar_flops((2, 2), group["polar"], group["polar_steps"])

    def shard_state(self, group: Group, param: Tensor) -> dict[str, Tensor]:
        if not group["momentum"]:
            return {}
        return {"momentum": torch.zeros_like(param, memory_format=torch.preserve_format)}

    def prepare(self, group: Group, grads: Tensors, states: list[dict[str, Tensor]]) -> Tensors:
        if not group["momentum"]:
            return grads
        momenta = [state["momentum"] for state in states]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        return momenta

    def precondition(self, group: Group, stack: Tensor, state: dict[str, Tensor]) -> Tensor:
        direction = lmo(stack, group["norm"], group["polar"], group["polar_steps"]).neg_()
        if group["form"] == "regularised":
            wide = torch.promote_types(stack.dtype, torch.float32)
            direction = direction * (stack.to(wide) * direction).sum((-2, -1), keepdim=True).to(stack.dtype)
        return direction

    def flops(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        if group["norm"] in POLAR_NORMS:
            return polar_flops(shape, group["polar"], group["polar_steps"], dtype)
        return 4.0 * shape[0] * shape[1]

    def workspace(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        result, usual = float(shape[0] * shape[1] * dtype.itemsize), super().workspace(group, shape, dtype)
        if group["norm"] == "frobenius" and dtype.itemsize >= 4:
            return 1.25 * result  # it is normalised in its own place; norms and powers beside it are small
        if group["norm"] in POLAR_NORMS:
            return max(usual, result + polar_workspace(shape, group["polar"], group["polar_steps"], dtype))
        return max(usual, result + polar_workspace(shape, "svd", None, dtype)) if group["norm"] == "nuclear" else usual
