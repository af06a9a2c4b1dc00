"""KL-SOAP: SOAP whose factors are those nearest in Kullback-Leibler divergence (Lin et al. 2025, arXiv 2509.03378)."""

import torch
from torch import Tensor

from .matrix import Group
from .soap import SIDES, SOAP

FIRST_EIGENVALUE = 0.1
"""What the eigenvalues begin with: the authors' init_factor."""


class KLSOAP(SOAP):
    """SOAP with L <- b2 L + (1-b2) G R^-1 Gt / n,  R <- b2 R + (1-b2) Gt L^-1 G / m, for an m x n matrix.

    The inverses are QR diag(r)^-1 QRt and the like, in the bases of before; the eigenvalues are averages too:
    r <- b2 r + (1-b2) mean over the rows of (QLt G QR)^2 / l, and l likewise, from 0.1.  The first step has neither:
    L = (1-b2) G Gt / n.  A side without a basis (``max_dim``) counts as the identity.

    Args: as SOAP's.
    """

    def initialise(self, state: dict[str, Tensor]) -> None:
        super().initialise(state)
        for key, value in state.items():
            if key.partition(".")[0].endswith("_eigenvalues"):
                value.fill_(FIRST_EIGENVALUE)

    def owner_state(self, group: Group, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        state = super().owner_state(group, shape)
        return state | {f"{side}_eigenvalues": state[side][:2] for side in SIDES if side in state}

    def factors(self, group: Group, grad: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        _, m, n = grad.shape
        whitened = {"left": grad, "right": grad.mT}
        if group["step"] > 1:
            beta2, means = group["betas"][1], {}
            for side, other in (("left", "right"), ("right", "left")):
                if other in state:
                    root = state[f"{other}_eigenvalues"].clamp_min(torch.finfo(grad.dtype).tiny).rsqrt().unsqueeze(-2)
                    whitened[side] = whitened[side] @ state[f"{other}_basis"] * root
                if side in state:
                    means[side] = (state[f"{side}_basis"].mT @ whitened[side]).square().mean(-1)
            for side, mean in means.items():
                state[f"{side}_eigenvalues"].lerp_(mean, 1 - beta2)
        return {"left": whitened["left"] * n**-0.5, "right": whitened["right"] * m**-0.5}

    def flops(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        products = sum(4.0 * size * shape[0] * shape[1] for size in shape if size <= group["max_dim"])
        return super().flops(group, shape, dtype) + products

    def workspace(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return super().workspace(group, shape, dtype) + 2.0 * wide * shape[0] * shape[1]
