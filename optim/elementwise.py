"""Elementwise optimizers that ``torch.optim`` lacks, or defines otherwise than the lecture does.

They act on each rank's own shard: no communication, whatever the sharding.
"""

import math

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Group, Optimizer, Tensors, check_fraction, local
from .limits import limit_entries
from .parameters import local_gradient


class Elementwise(Optimizer):
    """Base of the rules below: state named by ``buffers``, shaped and sharded like its parameter, from the start.

    A rule that counts its steps, from 1, has ``step=0`` among its defaults.
    """

    buffers: tuple[str, ...] = ()
    group_settings = {"step": int}

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            for name in self.buffers:
                self.state[param][name] = torch.zeros_like(param, memory_format=torch.preserve_format)

    def state_shapes(self, group: Group, param: Tensor) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.buffers, tuple(param.shape))

    def update_params(self) -> None:
        self.check_first_gradients()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            buffers = [[local(self.state[p][name]) for p in params] for name in self.buffers]
            if "step" in group:
                group["step"] += 1
            if params:
                grads = [local_gradient(p) for p in params]
                grads = limit_entries(grads) if self.squares else grads
                self.update(group, [local(p) for p in params], grads, *buffers)

    def update(self, group: Group, params: Tensors, grads: Tensors, *buffers: Tensors) -> None:
        """The rule, on local tensors; ``buffers`` in the order of their names.  Must not change ``grads``."""
        raise NotImplementedError


class Signum(Elementwise):
    """M <- mu M + (1-mu) G;  W <- (1 - lr wd) W - lr sign(M)  (Bernstein et al., arXiv 1802.04434, algorithm 2).

    ``momentum=0`` is signSGD.  With lr = gamma rho and weight_decay = 1 / rho it is also constrained Scion's rule for
    the max-abs ball of radius rho: W <- (1 - gamma) W - gamma rho sign(M).

    Args:
        params: any tensors.
        lr: change of every weight in one step.
        momentum: mu, in [0, 1).
        weight_decay: decoupled, multiplied by lr.

    Raises:
        ValueError: ``momentum`` out of range.
    """

    buffers = ("momentum",)
    squares = False

    def __init__(self, params: ParamsT, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    def check_group(self, group: Group) -> None:
        check_fraction(momentum=group["momentum"])

    def update(self, group: Group, params: Tensors, grads: Tensors, *buffers: Tensors) -> None:
        (momenta,) = buffers
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        decay(group, params)
        torch._foreach_add_(params, torch._foreach_sign(momenta), alpha=-float(group["lr"]))


class Lion(Elementwise):
    """U = sign(b1 M + (1-b1) G);  W <- (1 - lr wd) W - lr U;  M <- b2 M + (1-b2) G  (Chen et al., arXiv 2302.06675).

    Args:
        params: any tensors.
        lr: change of every weight in one step; the paper advises 3-10 times less than AdamW's.
        betas: (b1, b2), each in [0, 1).
        weight_decay: decoupled, multiplied by lr; the paper advises 3-10 times more than AdamW's.

    Raises:
        ValueError: ``betas`` out of range.
    """

    buffers = ("momentum",)
    squares = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    def check_group(self, group: Group) -> None:
        check_fraction(betas=group["betas"])

    def update(self, group: Group, params: Tensors, grads: Tensors, *buffers: Tensors) -> None:
        (momenta,) = buffers
        beta1, beta2 = group["betas"]
        signs = torch._foreach_lerp(momenta, grads, 1 - beta1)
        torch._foreach_sign_(signs)
        decay(group, params)
        torch._foreach_add_(params, signs, alpha=-float(group["lr"]))
        torch._foreach_lerp_(momenta, grads, 1 - beta2)


class AdagradInside(Elementwise):
    """V <- V + G^2;  W <- W - lr G / sqrt(V + eps): AdaGrad as the lecture writes it.

    ``torch.optim.Adagrad`` divides by sqrt(V) + eps instead; eps = 1e-6 inside the root acts like 1e-3 outside.

    Args:
        params: any tensors.
        lr: the constant numerator.
        eps: inside the root.
    """

    buffers = ("sum_of_squares",)

    def __init__(self, params: ParamsT, lr: float = 1e-2, eps: float = 1e-6):
        super().__init__(params, dict(lr=lr, eps=eps))

    def update(self, group: Group, params: Tensors, grads: Tensors, *buffers: Tensors) -> None:
        (squares,) = buffers
        torch._foreach_addcmul_(squares, grads, grads)
        _divide_inside(group, params, grads, squares)


class RMSpropInside(Elementwise):
    """V <- gamma V + (1-gamma) G^2;  W <- W - lr G / sqrt(V + eps): RMSProp as the lecture writes it.

    ``torch.optim.RMSprop`` divides by sqrt(V) + eps instead.

    Args:
        params: any tensors.
        lr: step size.
        gamma: decay of the mean square, in [0, 1).
        eps: inside the root.

    Raises:
        ValueError: ``gamma`` out of range.
    """

    buffers = ("mean_square",)

    def __init__(self, params: ParamsT, lr: float = 1e-2, gamma: float = 0.9, eps: float = 1e-6):
        super().__init__(params, dict(lr=lr, gamma=gamma, eps=eps))

    def check_group(self, group: Group) -> None:
        check_fraction(gamma=group["gamma"])

    def update(self, group: Group, params: Tensors, grads: Tensors, *buffers: Tensors) -> None:
        (squares,) = buffers
        torch._foreach_mul_(squares, group["gamma"])
        torch._foreach_addcmul_(squares, grads, grads, 1 - group["gamma"])
        _divide_inside(group, params, grads, squares)


def _divide_inside(group: Group, params: Tensors, grads: Tensors, squares: Tensors) -> None:
    """W <- W - lr G / sqrt(V + eps), with 0 where G = 0 whatever eps."""
    roots = torch._foreach_add(squares, group["eps"])
    torch._foreach_sqrt_(roots)
    torch._foreach_clamp_min_(roots, torch.finfo(roots[0].dtype).tiny ** 0.5)  # V underflows before G
    torch._foreach_addcdiv_(params, grads, roots, -float(group["lr"]))


def adam_roots(group: Group, grads: Tensors, squares: Tensors) -> Tensors:
    """V <- b2 V + (1-b2) G^2 in place; sqrt(V / (1-b2^t)) + eps, by which a gradient of 0 may be divided."""
    beta2 = group["betas"][1]
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    roots = list(torch._foreach_sqrt(squares))
    torch._foreach_div_(roots, math.sqrt(1 - beta2 ** group["step"]))
    torch._foreach_add_(roots, group["eps"])
    torch._foreach_clamp_min_(roots, torch.finfo(roots[0].dtype).tiny ** 0.5)  # V underflows before G, eps in float16
    return roots


def decay(group: Group, params: Tensors) -> None:
    """W <- (1 - lr wd) W."""
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - float(group["lr"]) * float(group["weight_decay"]))
