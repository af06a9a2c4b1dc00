"""Scion: conditional gradients over norm balls (Pethick et al. 2025, arXiv 2502.07529, algorithms 1 and 2)."""

from typing import Unpack

from .matrix import EngineSettings, Group, ParamsT
from .steepest import Steepest


class Scion(Steepest):
    """M <- mu M + (1-mu) G;  W <- (1 - lr) W + lr radius LMO(M), or without the (1 - lr) if not ``constrained``.

    Constrained, W stays in the ball ||W|| <= radius if it starts there and the polar factor is exact; an iteration that
    overshoots 1 widens the ball by as much.

    For sign-like norms of embeddings and heads, :class:`Signum` does the same without communication.

    Args:
        params: weight matrices (fan_out, fan_in); see :class:`MatrixOptimizer`.
        lr: the paper's gamma, in [0, 1] where constrained.
        norm: a matrix norm of ``NORMS``; ``rms_to_rms`` is the paper's "Spectral".
        radius: the paper's rho, ``scale`` in its code.
        constrained: pull towards 0 so that W stays in the ball.
        momentum: mu = 1 - alpha of the paper, in [0, 1).
        polar: method of ``POLAR_METHODS`` for the norms that need a polar factor.
        polar_steps: iterations (``None``: the method's default).

    Raises:
        ValueError: a setting out of range or an unknown name.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2**-12,
        norm: str = "rms_to_rms",
        radius: float = 50.0,
        constrained: bool = True,
        momentum: float = 0.9,
        polar: str = "polar_express",
        polar_steps: int | None = None,
        **engine: Unpack[EngineSettings],
    ):
        if constrained and not 0.0 <= lr <= 1.0:
            raise ValueError(f"lr={lr} is not in [0, 1], so that constrained=True would leave the ball")
        decay = 1.0 if constrained else 0.0
        super().__init__(params, lr, norm, "normalised", momentum, decay, polar, polar_steps, **engine)
        for settings in (self.defaults, *self.param_groups):
            settings.setdefault("radius", radius)

    def scale(self, group: Group, shape: tuple[int, int]) -> float:
        return float(group["radius"])
