"""MARS: AdamW on gradients whose variance a step's difference reduces (Yuan et al. 2024, arXiv 2411.10438)."""

import math

import torch
from torch.optim.optimizer import ParamsT

from .base import Group, Tensors, check_fraction, whole_sums
from .elementwise import Elementwise, adam_roots, decay


class MARS(Elementwise):
    """C = G + gamma b1/(1-b1) (G - G'), divided by its norm where that is above 1, G' the gradient of the step before;
    M <- b1 M + (1-b1) C;  V <- b2 V + (1-b2) C^2;  W <- (1 - lr wd) W - lr M^ / (sqrt(V^) + eps), ^ as in Adam.

    This is MARS-AdamW with the approximate gradient difference (algorithm 2 and section 3.2).  The norm is that of the
    whole tensor: where it is sharded, one all-reduce of a number a tensor in each step.

    Args:
        params: any tensors; the authors leave 1-D ones to AdamW.
        lr: as for AdamW; the authors take more.
        betas: (b1, b2), each in [0, 1).
        gamma: how much of the difference is added.
        eps: added to the root.
        weight_decay: decoupled, multiplied by lr.

    Raises:
        ValueError: ``betas`` or ``gamma`` out of range.
    """

    buffers = ("momentum", "second_moment", "last_gradient")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        gamma: float = 0.025,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        settings = dict(lr=lr, betas=betas, gamma=gamma, eps=eps, weight_decay=weight_decay)
        super().__init__(params, settings | {"step": 0})

    def check_group(self, group: Group) -> None:
        check_fraction(betas=group["betas"])
        if not 0 <= group["gamma"] < math.inf:
            raise ValueError(f"gamma={group['gamma']}: give a number >= 0")

    def update(self, group: Group, params: Tensors, grads: Tensors, *buffers: Tensors) -> None:
        momenta, squares, last = buffers
        beta1 = group["betas"][0]
        corrected = list(torch._foreach_sub(grads, last))
        torch._foreach_mul_(corrected, group["gamma"] * beta1 / (1 - beta1))
        torch._foreach_add_(corrected, grads)
        whole = [p for p in group["params"] if p.grad is not None]
        squares_of = [norm.square() for norm in torch._foreach_norm(corrected, dtype=torch.float64)]
        norms = [total.sqrt().clamp_min_(1.0) for total in whole_sums(squares_of, whole)]
        torch._foreach_div_(corrected, [norm.to(corrected[0].dtype) for norm in norms])
        torch._foreach_copy_(last, grads)
        torch._foreach_lerp_(momenta, corrected, 1 - beta1)
        decay(group, params)
        lr = float(group["lr"]) / (1 - beta1 ** group["step"])
        torch._foreach_addcdiv_(params, momenta, adam_roots(group, corrected, squares), -lr)
