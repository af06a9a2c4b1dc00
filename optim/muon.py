"""Muon: momentum, orthogonalized (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)."""

import math
from typing import Unpack

import torch
from torch import Tensor

from .base import check_choice, check_fraction
from .matrix import EngineSettings, Group, MatrixOptimizer, ParamsT, Tensors
from .polar import polar, polar_flops, polar_workspace

SCALES = {
    # Jordan's choice: a tall matrix takes a longer step.
    "keller": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    # Moonlight (arXiv 2502.16982, section 2.2): the update's RMS matches AdamW's, whose lr and decay carry over.
    "match_rms": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    # The unit ball of the RMS -> RMS operator norm (Bernstein and Newhouse, arXiv 2409.20325).
    "rms_to_rms": lambda rows, cols: math.sqrt(rows / cols),
}


class Muon(MatrixOptimizer):
    """M <- mu M + (1-mu) G;  U = (1-mu) G + mu M if nesterov else M;  W <- (1-lr wd) W - lr scale polar(U).

    Args:
        params: weight matrices (fan_out, fan_in); see :class:`MatrixOptimizer`.
        lr: length of a step in spectral norm, before ``scale``.
        momentum: mu, in [0, 1).
        nesterov: look ahead by one gradient.
        weight_decay: decoupled, multiplied by lr.
        cautious: decay only where update * weight >= 0.
        scale: ``keller``, ``match_rms`` or ``rms_to_rms``.
        polar: method of ``POLAR_METHODS``.
        polar_steps: iterations (``None``: the method's default).

    Raises:
        ValueError: a setting out of range or an unknown ``scale`` or ``polar``.
    """

    half_precision = True
    squares = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        cautious: bool = False,
        scale: str = "keller",
        polar: str = "polar_express",
        polar_steps: int | None = None,
        **engine: Unpack[EngineSettings],
    ):
        settings = dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, cautious=cautious)
        super().__init__(params, dict(settings, scale=scale, polar=polar, polar_steps=polar_steps), **engine)

    def check_group(self, group: Group) -> None:
        check_fraction(momentum=group["momentum"])
        check_choice(SCALES, scale=group["scale"])
        polar_flops((2, 2), group["polar"], group["polar_steps"])

    def shard_state(self, group: Group, param: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(param, memory_format=torch.preserve_format)}

    def prepare(self, group: Group, grads: Tensors, states: list[dict[str, Tensor]]) -> Tensors:
        momenta = [state["momentum"] for state in states]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        return list(torch._foreach_lerp(momenta, grads, 1 - group["momentum"])) if group["nesterov"] else momenta

    def precondition(self, group: Group, stack: Tensor, state: dict[str, Tensor]) -> Tensor:
        return polar(stack, group["polar"], group["polar_steps"], overwrite=True)

    def flops(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        return polar_flops(shape, group["polar"], group["polar_steps"], dtype)

    def workspace(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        return polar_workspace(shape, group["polar"], group["polar_steps"], dtype)

    def scale(self, group: Group, shape: tuple[int, int]) -> float:
        return SCALES[group["scale"]](*shape)
