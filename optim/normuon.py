"""NorMuon: Muon with a second moment per neuron (Li et al. 2025, arXiv 2510.05491, algorithm 1)."""

from typing import Unpack

import torch
from torch import Tensor

from .base import check_choice, check_fraction
from .matrix import EngineSettings, Group, MatrixOptimizer, ParamsT
from .muon import Muon
from .stacks import frobenius_norm

STATISTICS = ("rows", "longer")


class NorMuon(Muon):
    """O = Muon's orthogonalized momentum;  v <- b2 v + (1-b2) mean over each row of O^2;  O' = O / (sqrt(v) + eps),
    rescaled to O's Frobenius norm;  W <- (1 - lr wd) W - lr scale O'.

    A row is a neuron (fan-out).  Rows and norm are those of the whole matrix, however it is sharded.  For an exact
    polar factor of full rank, ``scale="match_rms"`` is the paper's step 0.2 lr sqrt(m n) / ||O'||_F.

    Args:
        params: weight matrices (fan_out, fan_in); see :class:`MatrixOptimizer`.
        lr: as for Muon, whose other settings are accepted too.
        beta2: decay of the row statistics, in [0, 1).
        eps: added to the root of the row statistics.
        statistics: ``rows``, or ``longer``: of a matrix with more columns than rows v is of its columns (KellerJordan/
            modded-nanogpt, track 3, #10).
        floor: smallest v of the scaled O in the root (1e-10 in #10).
        scale: ``keller``, ``match_rms`` or ``rms_to_rms``.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        beta2: float = 0.95,
        eps: float = 1e-8,
        statistics: str = "rows",
        floor: float = 0.0,
        scale: str = "match_rms",
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        cautious: bool = False,
        polar: str = "polar_express",
        polar_steps: int | None = None,
        **engine: Unpack[EngineSettings],
    ):
        settings: Group = dict(lr=lr, beta2=beta2, eps=eps, scale=scale, momentum=momentum, nesterov=nesterov)
        settings |= dict(weight_decay=weight_decay, cautious=cautious, polar=polar, polar_steps=polar_steps)
        settings |= dict(statistics=statistics, floor=floor)
        MatrixOptimizer.__init__(self, params, settings, **engine)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        check_fraction(beta2=group["beta2"])
        check_choice(STATISTICS, statistics=group["statistics"])

    def owner_state(self, group: Group, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        k, m, n = shape
        return {"column_mean_square": (k, n)} if _by_columns(group, m, n) else {"row_mean_square": (k, m)}

    def precondition(self, group: Group, stack: Tensor, state: dict[str, Tensor]) -> Tensor:
        _, m, n = stack.shape
        name, dim = ("column_mean_square", -2) if _by_columns(group, m, n) else ("row_mean_square", -1)
        mean_square = state[name]
        update = super().precondition(group, stack, state).to(mean_square.dtype)
        mean_square.lerp_(update.square().mean(dim), 1 - group["beta2"])
        floored = mean_square
        if group["floor"]:
            floored = mean_square.clamp_min(group["floor"] / self.scale(group, (m, n)) ** 2)
        least = torch.finfo(update.dtype).tiny ** 0.5  # a row of zeros stays one without eps
        normalised: Tensor = update / (floored.sqrt() + group["eps"]).clamp_min(least).unsqueeze(dim)
        length = frobenius_norm(normalised).clamp_min(torch.finfo(update.dtype).tiny)
        return normalised.mul_(frobenius_norm(update) / length)

    def workspace(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        wide = torch.promote_types(dtype, torch.float32).itemsize
        update_and_square = 2.0 * shape[0] * shape[1] * wide
        return max(super().workspace(group, shape, dtype), update_and_square)


def _by_columns(group: Group, m: int, n: int) -> bool:
    return bool(group["statistics"] == "longer" and n > m)
