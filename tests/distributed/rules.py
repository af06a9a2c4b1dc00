"""A rule with state on whole matrices, for tests of whatever must not depend on who owns them."""

import torch
from torch import Tensor

from optim.matrix import Group
from optim.muon import Muon


class Whitened(Muon):
    """L <- 0.9 L + 0.1 M Mt every second step;  W <- W - lr scale (L / (1 - 0.9^t) + 0.01 I)^-1/2 M."""

    def owner_state(self, group: Group, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        k, m, _ = shape
        return {"left": (k, m, m)}

    def precondition(self, group: Group, stack: Tensor, state: dict[str, Tensor]) -> Tensor:
        left = state["left"]
        if group["step"] % 2:
            left.lerp_(stack @ stack.mT, 0.1)
        damped = left / (1 - 0.9 ** group["step"]) + 0.01 * torch.eye(left.shape[-1], dtype=left.dtype)
        values, vectors = torch.linalg.eigh(damped)
        return vectors @ (values.rsqrt().unsqueeze(-1) * (vectors.mT @ stack))
