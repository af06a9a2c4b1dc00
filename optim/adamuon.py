"""AdaMuon: Muon of signs with a second moment per entry (Si et al. 2025, arXiv 2507.11005, algorithm 1)."""

import math
from typing import Unpack

import torch
from torch import Tensor

from .base import check_fraction
from .matrix import EngineSettings, Group, MatrixOptimizer, ParamsT
from .muon import Muon
from .polar import polar, polar_flops
from .stacks import frobenius_norm


class AdaMuon(Muon):
    """O = polar(sign(U)), U as Muon's;  V <- b2 V + (1-b2) O^2;  O' = O / (sqrt(V) + eps);
    W <- (1 - lr wd) W - lr 0.2 sqrt(m n) O' / ||O'||, so that the update's RMS is 0.2, as AdamW's is about.

    Args:
        params: weight matrices (fan_out, fan_in); see :class:`MatrixOptimizer`.
        lr: as for AdamW.
        beta2: decay of V, in [0, 1); the authors take that of the momentum.
        eps: added to the root.
        momentum, nesterov, weight_decay, cautious, polar, polar_steps: as for Muon.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 6e-4,
        momentum: float = 0.95,
        beta2: float = 0.95,
        eps: float = 1e-8,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        cautious: bool = False,
        polar: str = "polar_express",
        polar_steps: int | None = None,
        **engine: Unpack[EngineSettings],
    ):
        settings: Group = dict(lr=lr, momentum=momentum, beta2=beta2, eps=eps, nesterov=nesterov)
        settings |= dict(weight_decay=weight_decay, cautious=cautious, polar=polar, polar_steps=polar_steps)
        MatrixOptimizer.__init__(self, params, settings, **engine)

    def check_group(self, group: Group) -> None:
        check_fraction(momentum=group["momentum"], beta2=group["beta2"])
        polar_flops((2, 2), group["polar"], group["polar_steps"])

    def owner_state(self, group: Group, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        return {"second_moment": shape}

    def precondition(self, group: Group, stack: Tensor, state: dict[str, Tensor]) -> Tensor:
        second = state["second_moment"]
        factor = polar(stack.sign_(), group["polar"], group["polar_steps"], overwrite=True).to(second.dtype)
        second.mul_(group["beta2"]).addcmul_(factor, factor, value=1 - group["beta2"])
        smallest = torch.finfo(second.dtype).tiny ** 0.5  # an entry of 0 stays one without eps
        update = factor.div_(second.sqrt().add_(group["eps"] or smallest))
        return update.div_(frobenius_norm(update).clamp_min(smallest))

    def workspace(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return super().workspace(group, shape, dtype) + 2.0 * shape[0] * shape[1] * wide

    def scale(self, group: Group, shape: tuple[int, int]) -> float:
        return 0.2 * math.sqrt(shape[0] * shape[1])
