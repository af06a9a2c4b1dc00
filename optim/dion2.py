"""Dion2: Muon on the largest part of the rows, the rest is fed back (Ahn et al. 2025, arXiv 2512.16928)."""

import math
from typing import Unpack

import torch
from torch import Tensor

from .base import check_choice, check_fraction
from .matrix import EngineSettings, Group, MatrixOptimizer, ParamsT, Tensors
from .muon import SCALES
from .polar import polar, polar_flops, polar_workspace
from .stacks import frobenius_norm


class Dion2(MatrixOptimizer):
    """M <- M + G;  S = the ``fraction`` of M's rows with the largest l1 norms;
    W <- (1 - lr wd) W - lr scale polar(S), in those rows alone;  these rows of M <- mu M: error feedback.

    Rows are chosen of the whole matrix, however it is sharded ("global" selection of microsoft/dion; its default
    chooses of each rank's shard, so that the update depends on the number of ranks).  M is on shards: after the step,
    which rows were chosen is read from the update, which is zero in the others.

    Args:
        params: weight matrices (fan_out, fan_in); see :class:`MatrixOptimizer`.
        lr: as for Muon.
        momentum: mu, in [0, 1): how much of a row stays when it has been used.
        fraction: of the rows, in (0, 1]; at least one.
        weight_decay: decoupled, multiplied by lr; of all rows.
        scale: ``keller``, ``match_rms`` or ``rms_to_rms``.
        polar, polar_steps: as for Muon.

    Raises:
        ValueError: a setting out of range.
    """

    half_precision = True
    squares = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        momentum: float = 0.95,
        fraction: float = 0.25,
        weight_decay: float = 0.0,
        scale: str = "rms_to_rms",
        polar: str = "polar_express",
        polar_steps: int | None = None,
        **engine: Unpack[EngineSettings],
    ):
        settings: Group = dict(lr=lr, momentum=momentum, fraction=fraction, weight_decay=weight_decay, scale=scale)
        super().__init__(params, settings | dict(polar=polar, polar_steps=polar_steps), **engine)

    def check_group(self, group: Group) -> None:
        check_fraction(momentum=group["momentum"])
        check_choice(SCALES, scale=group["scale"])
        polar_flops((2, 2), group["polar"], group["polar_steps"])
        if not 0 < group["fraction"] <= 1:
            raise ValueError(f"fraction={group['fraction']}: give a part of the rows, above 0 and up to 1")
        if group["constraint"]:
            raise ValueError(f"constraint={group['constraint']}: {type(self).__name__} does not keep it; give null")

    def shard_state(self, group: Group, param: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(param, memory_format=torch.preserve_format)}

    def prepare(self, group: Group, grads: Tensors, states: list[dict[str, Tensor]]) -> Tensors:
        momenta = [state["momentum"] for state in states]
        torch._foreach_add_(momenta, grads)
        return momenta

    def precondition(self, group: Group, stack: Tensor, state: dict[str, Tensor]) -> Tensor:
        count = self._count(group, stack.shape[-2])
        index = _row_sums(stack).topk(count, sorted=False).indices.sort().values.unsqueeze(-1)  # [k, count, 1]
        chosen = stack.take_along_dim(index, -2)
        update = polar(chosen, group["polar"], group["polar_steps"], overwrite=True)
        update = self.normalise(group, update, index, state).to(stack.dtype)
        return stack.zero_().scatter_(-2, index.expand_as(update), update)

    def measure(self, group: Group, params: Tensors, updates: Tensors, states: list[dict[str, Tensor]]) -> Tensors:
        return [_row_sums(update.flatten(1)).unsqueeze(0) for update in updates]

    def apply(
        self,
        group: Group,
        params: Tensors,
        updates: Tensors,
        scales: list[float],
        states: list[dict[str, Tensor]],
        sums: Tensors,
    ) -> None:
        super().apply(group, params, updates, scales, states, [])
        for state, rows in zip(states, sums, strict=True):
            momentum = state["momentum"]
            kept = torch.ones_like(rows[0], dtype=momentum.dtype).masked_fill_(rows[0] > 0, group["momentum"])
            momentum.mul_(kept.view(-1, *[1] * (momentum.ndim - 1)))

    def normalise(self, group: Group, update: Tensor, index: Tensor, state: dict[str, Tensor]) -> Tensor:
        """What becomes of the polar factor [k, rows, n] of the rows ``index`` [k, rows, 1]."""
        return update

    def _count(self, group: Group, rows: int) -> int:
        return max(1, math.ceil(rows * float(group["fraction"])))

    def flops(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        m, n = shape
        return polar_flops((self._count(group, m), n), group["polar"], group["polar_steps"], dtype) + 3.0 * m * n

    def workspace(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        wide = torch.promote_types(dtype, torch.float32).itemsize
        count, n = self._count(group, shape[0]), shape[1]
        chosen = polar_workspace((count, n), group["polar"], group["polar_steps"], dtype)
        return max(wide * shape[0] * shape[1], chosen + 4.0 * wide * count * n)  # norms of all rows, or the step

    def scale(self, group: Group, shape: tuple[int, int]) -> float:
        return SCALES[group["scale"]](*shape)


def _row_sums(x: Tensor) -> Tensor:
    """l1 norms of the rows, in float32 at least."""
    sums: Tensor = torch.linalg.vector_norm(x, 1, -1, dtype=torch.promote_types(x.dtype, torch.float32))
    return sums


class NorDion2(Dion2):
    """Dion2 whose step then is NorMuon's (also called Dion3 in microsoft/dion): O = the polar factor of the
    chosen rows;  v <- b2 v + (1-b2) mean over each of them of O^2, others stay;  O' = O / (sqrt(v) + eps), rescaled to
    O's Frobenius norm.

    Args:
        beta2: decay of the row statistics, in [0, 1).
        eps: added to their root.
        params, lr, …: as for Dion2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        momentum: float = 0.95,
        fraction: float = 0.25,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scale: str = "rms_to_rms",
        polar: str = "polar_express",
        polar_steps: int | None = None,
        **engine: Unpack[EngineSettings],
    ):
        settings: Group = dict(lr=lr, momentum=momentum, fraction=fraction, beta2=beta2, eps=eps, scale=scale)
        settings |= dict(weight_decay=weight_decay, polar=polar, polar_steps=polar_steps)
        MatrixOptimizer.__init__(self, params, settings, **engine)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        check_fraction(beta2=group["beta2"])

    def owner_state(self, group: Group, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        return {"row_mean_square": shape[:2]}

    def normalise(self, group: Group, update: Tensor, index: Tensor, state: dict[str, Tensor]) -> Tensor:
        statistics = state["row_mean_square"].unsqueeze(-1)
        update = update.to(statistics.dtype)
        mean_square = statistics.take_along_dim(index, -2).lerp_(update.square().mean(-1, True), 1 - group["beta2"])
        statistics.scatter_(-2, index, mean_square)
        floor = torch.finfo(update.dtype).tiny ** 0.5  # a row of zeros stays one without eps
        normalised: Tensor = update / (mean_square.sqrt() + group["eps"]).clamp_min(floor)
        return normalised.mul_(frobenius_norm(update) / frobenius_norm(normalised).clamp_min(floor))
