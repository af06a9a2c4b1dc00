"""AdamH: Adam on the hyperball, where every weight keeps its norm (Wen et al. 2026, arXiv 2606.16899)."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Group, Tensors, check_fraction, whole_sums
from .constraints import hyperball_step
from .elementwise import Elementwise, adam_roots


class AdamH(Elementwise):
    """U = M^ / (sqrt(V^) + eps) as in Adam;  N = W - lr ||W|| U / ||U||;  W <- N ||W|| / ||N||, Frobenius norms.

    lr is the length of a step in parts of the weight's norm, which stays; there is no weight decay.  Norms are those of
    whole tensors: where they are sharded, one all-reduce of three numbers a tensor in each step.

    Args:
        params: any tensors; one that is zero stays so, until its norm is set by hand.
        lr: of about 0.01 to 0.03.
        betas: (b1, b2), each in [0, 1).
        eps: added to the root.

    Raises:
        ValueError: ``betas`` out of range.
    """

    buffers = ("momentum", "second_moment")

    def __init__(self, params: ParamsT, lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, step=0))

    def check_group(self, group: Group) -> None:
        check_fraction(betas=group["betas"])

    def update(self, group: Group, params: Tensors, grads: Tensors, *buffers: Tensors) -> None:
        momenta, squares = buffers
        torch._foreach_lerp_(momenta, grads, 1 - group["betas"][0])
        updates = list(torch._foreach_div(momenta, adam_roots(group, grads, squares)))
        whole = [p for p in group["params"] if p.grad is not None]
        sums = [_sums(param, update) for param, update in zip(params, updates, strict=True)]
        hyperball_step(group, params, updates, whole_sums(sums, whole))


def _sums(param: Tensor, update: Tensor) -> Tensor:
    """||W||^2, ||U||^2, <U, W>, added up in float64."""
    wide = torch.promote_types(param.dtype, torch.float32)
    w, u = param.to(wide), update.to(wide)
    return torch.stack([(x * y).sum(dtype=torch.float64) for x, y in ((w, w), (u, u), (u, w))])
