"""ADOPT: Adam whose second moment does not yet know the gradient that it divides (Taniguchi et al. 2024)."""

import torch
from torch.optim.optimizer import ParamsT

from .base import Group, Tensors, check_fraction
from .elementwise import Elementwise, decay


class ADOPT(Elementwise):
    """M <- b1 M + (1-b1) clip(G / max(sqrt(V), eps), c);  W <- (1 - lr wd) W - lr M;  V <- b2 V + (1-b2) G^2.

    c = t^(1/4) bounds every entry; the first step sets V = G^2 and moves nothing, t counts those after it (arXiv
    2411.02853, algorithm 2, the clipped variant that the authors recommend).

    Args:
        params: any tensors.
        lr: as for AdamW.
        betas: (b1, b2), each in [0, 1).
        eps: least value of the root.
        weight_decay: decoupled, multiplied by lr.

    Raises:
        ValueError: ``betas`` out of range.
    """

    buffers = ("momentum", "second_moment")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0))

    def check_group(self, group: Group) -> None:
        check_fraction(betas=group["betas"])

    def update(self, group: Group, params: Tensors, grads: Tensors, *buffers: Tensors) -> None:
        momenta, squares = buffers
        (beta1, beta2), step = group["betas"], group["step"] - 1
        if step:
            roots = torch._foreach_sqrt(squares)
            torch._foreach_clamp_min_(roots, max(group["eps"], torch.finfo(roots[0].dtype).tiny))
            normalised = torch._foreach_div(grads, roots)
            torch._foreach_clamp_max_(normalised, step**0.25)
            torch._foreach_clamp_min_(normalised, -(step**0.25))
            torch._foreach_lerp_(momenta, normalised, 1 - beta1)
            decay(group, params)
            torch._foreach_add_(params, momenta, alpha=-float(group["lr"]))
        torch._foreach_mul_(squares, beta2 if step else 0.0)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2 if step else 1.0)
