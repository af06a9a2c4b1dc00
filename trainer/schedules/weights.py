"""What is done to the weights around an update: a look-ahead before its gradient, and an average that is evaluated.

Both are elementwise, so that shards need no communication, and their state is named by parameter, so that it is resumed
on any number of ranks.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from optim.matrix import local
from optim.schedule import Schedule, in_steps
from trainer.schedules.config import AverageConfig, LookaheadConfig

Weights = Mapping[str, Tensor]


class Lookahead:
    """EMA-Nesterov (arXiv 2605.25395): the gradient is taken where the mean of past changes would lead.

    The shift is never undone, and belongs to the change of its update (KellerJordan/modded-nanogpt, track 3, #39, #44).

    Args:
        weights: parameters by name.
        multiplier: of the learning rate that the shift follows.
        end: horizon of the schedule [updates].
    """

    def __init__(self, config: LookaheadConfig, weights: Weights, multiplier: Schedule, end: int):
        self.config, self.multiplier = config, multiplier
        self.first, self.last = in_steps(config.start, end), in_steps(config.stop, end)
        self.weights = [local(weight.detach()) for weight in weights.values()]
        self.state = {name: torch.zeros_like(weight.detach()) for name, weight in weights.items()}
        self.means = [local(mean) for mean in self.state.values()]
        self.before: list[Tensor] = []

    def start_step(self, step: int) -> None:
        self.before = [weight.clone() for weight in self.weights]
        if self.first <= step < self.last:
            size = self.config.size * (self.multiplier(step - 1) if step else 1.0)
            torch._foreach_add_(self.weights, self.means, alpha=size)

    def end_step(self, step: int) -> None:
        changes = torch._foreach_sub(self.weights, self.before)
        torch._foreach_lerp_(self.means, changes, 1 - self.config.decay)
        self.before = []


class Average:
    """An average of late weights that is read at evaluation (Polyak and Juditsky 1992, with a horizon; track 3, #45).

    Args:
        weights: parameters by name, without those that stay out.
        end: horizon of the schedule [updates].
    """

    def __init__(self, config: AverageConfig, weights: Weights, end: int):
        self.blend, self.length = config.blend, max(1, in_steps(config.length, end))
        self.first, self.last = max(1, in_steps(config.start, end)), in_steps(config.stop, end)
        self.weights = [local(weight.detach()) for weight in weights.values()]
        self.state = {name: torch.zeros_like(weight.detach()) for name, weight in weights.items()}
        self.averages = [local(average) for average in self.state.values()]

    def end_step(self, step: int) -> None:
        """After update number step + 1."""
        if step + 1 <= self.first:  # from the beginning, so that a branch may let it start earlier
            torch._foreach_copy_(self.averages, self.weights)
        elif step + 1 < self.last:
            torch._foreach_lerp_(self.averages, self.weights, 1 / self.length)

    @contextmanager
    def evaluated(self, step: int) -> Iterator[None]:
        """While the weights after ``step`` updates are evaluated; afterwards they are what they were."""
        if step < self.first:
            yield
            return
        kept = [weight.clone() for weight in self.weights]
        torch._foreach_lerp_(self.weights, self.averages, self.blend)
        try:
            yield
        finally:
            torch._foreach_copy_(self.weights, kept)
