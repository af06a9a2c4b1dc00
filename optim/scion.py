"""Scion: conditional gradients over norm balls (Pethick et al. 2025, arXiv 2502.07529, algorithms 1 and 2)."""

from typing import Unpack

from .matrix import EngineSettings, Group, MatrixOptimizer, ParamsT
from .settings import typed
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
        settings: Group = dict(lr=lr, norm=norm, form="normalised", momentum=momentum, radius=radius)
        settings |= dict(weight_decay=float(typed(constrained, bool)), polar=polar, polar_steps=polar_steps)
        MatrixOptimizer.__init__(self, params, settings, **engine)

    def add_param_group(self, param_group: Group) -> None:
        if "constrained" in param_group:
            param_group["weight_decay"] = float(typed(param_group.pop("constrained"), bool))
        super().add_param_group(param_group)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        if group["weight_decay"] not in (0, 1) or group["form"] != "normalised":
            raise ValueError(
                f"weight_decay={group['weight_decay']}, form={group['form']}: Scion has neither; give constrained "
                "(true or false) and radius, or use Steepest"
            )
        if group["weight_decay"] and not 0.0 <= group["lr"] <= 1.0:
            raise ValueError(f"lr={group['lr']} is not in [0, 1], so that constrained=True would leave the ball")

    def scale(self, group: Group, shape: tuple[int, int]) -> float:
        return float(group["radius"])
