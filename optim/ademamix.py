"""AdEMAMix: Adam with a second, much slower average of the gradient (Pagliardini et al. 2024, arXiv 2409.03137)."""

import math

import torch
from torch.optim.optimizer import ParamsT

from .base import Group, Tensors, check_fraction
from .elementwise import Elementwise, adam_roots, decay


class AdEMAMix(Elementwise):
    """M1 <- b1 M1 + (1-b1) G;  M2 <- b3 M2 + (1-b3) G;  V <- b2 V + (1-b2) G^2;
    W <- (1 - lr wd) W - lr (M1 / (1-b1^t) + alpha M2) / (sqrt(V / (1-b2^t)) + eps)  (section 3, algorithm 1).

    Args:
        params: any tensors.
        lr: as for AdamW.
        betas: (b1, b2, b3), each in [0, 1).
        alpha: weight of the slow average.
        warmup: steps over which alpha grows linearly from 0, and the half-life of M2 from that of M1; the paper takes
            all steps of the run.  0 for none.
        eps: added to the root.
        weight_decay: decoupled, multiplied by lr.

    Raises:
        ValueError: a setting out of range.
    """

    buffers = ("momentum", "slow_momentum", "second_moment")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        warmup: int = 0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        settings = dict(lr=lr, betas=betas, alpha=alpha, warmup=warmup, eps=eps, weight_decay=weight_decay)
        super().__init__(params, settings | {"step": 0})

    def check_group(self, group: Group) -> None:
        check_fraction(betas=group["betas"])

    def update(self, group: Group, params: Tensors, grads: Tensors, *buffers: Tensors) -> None:
        momenta, slow, squares = buffers
        (beta1, _, beta3), step = group["betas"], group["step"]
        grown = min(1.0, step / group["warmup"]) if group["warmup"] else 1.0
        torch._foreach_lerp_(momenta, grads, 1 - beta1)
        torch._foreach_lerp_(slow, grads, 1 - _between(beta1, beta3, grown))
        updates = torch._foreach_div(momenta, 1 - beta1**step)
        torch._foreach_add_(updates, slow, alpha=grown * group["alpha"])
        decay(group, params)
        torch._foreach_addcdiv_(params, updates, adam_roots(group, grads, squares), -float(group["lr"]))


def _between(first: float, last: float, part: float) -> float:
    """The decay whose half-life lies that part of the way from the one of ``first`` to the one of ``last``."""
    ends = [1 / math.log(beta) if beta else 0.0 for beta in (first, last)]
    inverse_log = ends[0] + part * (ends[1] - ends[0])
    return math.exp(1 / inverse_log) if inverse_log else 0.0
