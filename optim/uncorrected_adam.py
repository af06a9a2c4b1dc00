"""Adam without bias correction, as track 3's records #44 to #46 have it on what is one-dimensional."""

import torch
from torch.optim.optimizer import ParamsT

from .base import Group, Tensors, check_fraction
from .elementwise import Elementwise


class UncorrectedAdam(Elementwise):
    """M <- b1 M + (1-b1) G;  V <- b2 V + (1-b2) G^2;  W <- W - lr M / (sqrt(V) + eps), from M = V = 0.

    The first steps are (1-b1) / sqrt(1-b2) of Adam's (KellerJordan/modded-nanogpt, records/track_3_optimization, #44).

    Args:
        params: any tensors.
        lr: as for Adam.
        betas: (b1, b2), each in [0, 1).
        eps: added to the root.

    Raises:
        ValueError: ``betas`` out of range.
    """

    buffers = ("momentum", "second_moment")

    def __init__(self, params: ParamsT, lr: float = 1e-2, betas: tuple[float, float] = (0.8, 0.99), eps: float = 1e-10):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))

    def check_group(self, group: Group) -> None:
        check_fraction(betas=group["betas"])

    def update(self, group: Group, params: Tensors, grads: Tensors, *buffers: Tensors) -> None:
        momenta, seconds = buffers
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(momenta, grads, 1 - beta1)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(seconds)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_clamp_min_(roots, torch.finfo(roots[0].dtype).tiny ** 0.5)
        torch._foreach_addcdiv_(params, momenta, roots, -float(group["lr"]))
