"""Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682): no decay of lr, weights are evaluated at an average."""

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from .base import Group, Tensors, check_fraction, local
from .elementwise import Elementwise, adam_roots

TRAINING = "training_weights"
"""Key of the weights that ``eval`` keeps for ``train``."""


class ScheduleFreeAdamW(Elementwise):
    """Gradients G are taken at Y = (1-b1) Z + b1 X, Z takes Adam's steps, X averages Z (section 4, algorithm 1):
    V <- b2 V + (1-b2) G^2;  U = G / (sqrt(V / (1-b2^t)) + eps) + wd Y;  Z <- Z - lr U;  X <- (1-c) X + c Z.

    c is lr_max^2, squared the largest lr so far, over its sum over all steps: steps of the warm-up count less.  The
    parameters are Y; beside V, D = Z - Y is kept.  ``eval`` sets them to X, and keeps Y apart meanwhile, so that
    ``train`` brings it back bit for bit: do so around every evaluation and checkpoint.  Use a constant lr schedule
    with a warm-up.

    Args:
        params: any tensors.
        lr: of Z; the authors advise 1 to 10 times AdamW's.
        betas: (b1, b2), b1 in (0, 1), b2 in [0, 1).
        eps: added to the root.
        weight_decay: multiplied by lr, at Y.

    Raises:
        ValueError: ``betas`` out of range.
        RuntimeError: ``step`` while the weights are the average.
    """

    buffers = ("offset", "second_moment")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, settings | dict(step=0, lr_max=0.0, weight_sum=0.0))

    def check_group(self, group: Group) -> None:
        check_fraction(betas=group["betas"])
        if not group["betas"][0]:
            raise ValueError(f"betas={group['betas']}: give a first one above 0, or the average cannot be told from Y")

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """A state that was saved at the average has its training weights too."""
        states = {n: {k: v for k, v in s.items() if k != TRAINING} for n, s in state_dict["state"].items()}
        super().check_state({**state_dict, "state": states})

    def update_params(self) -> None:
        if any(TRAINING in state for state in self.state.values()):
            raise RuntimeError("the weights are the average that eval() gave: call train() of the optimizer first")
        super().update_params()

    def update(self, group: Group, params: Tensors, grads: Tensors, *buffers: Tensors) -> None:
        offsets, squares = buffers
        beta1, lr = group["betas"][0], float(group["lr"])
        group["lr_max"] = max(lr, group["lr_max"])
        group["weight_sum"] += group["lr_max"] ** 2
        part = group["lr_max"] ** 2 / group["weight_sum"] if group["weight_sum"] else 0.0
        updates = torch._foreach_div(grads, adam_roots(group, grads, squares))
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=float(group["weight_decay"]))
        torch._foreach_add_(params, offsets, alpha=part)
        torch._foreach_add_(params, updates, alpha=lr * (beta1 * (1 - part) - 1))
        torch._foreach_add_(offsets, updates, alpha=-lr * beta1)  # the new Z - Y, before the average has moved
        torch._foreach_mul_(offsets, 1 - part)

    @torch.no_grad()
    def eval(self) -> None:
        """Set the weights to the average X, unless they are."""
        for group in self.param_groups:
            back = 1 - 1 / group["betas"][0]
            for param in group["params"]:
                state = self.state[param]
                if TRAINING not in state:
                    state[TRAINING] = param.detach().clone()
                    local(param).add_(local(state["offset"]), alpha=back)

    @torch.no_grad()
    def train(self) -> None:
        """Set the weights to Y again, where gradients are to be taken."""
        for param, state in self.state.items():
            if TRAINING in state:
                local(param).copy_(local(state.pop(TRAINING)))
