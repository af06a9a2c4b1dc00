"""One object for all that follows the step, around the Trainer's update."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from optim.combined import Combined
from trainer.config import Config
from trainer.schedules.due import eval_is_due
from trainer.schedules.weights import Average, Lookahead


class Schedules:
    """Sets learning rates and other settings, shifts and averages weights; ``start_step`` and ``end_step`` enclose the
    forward pass, the backward pass and the update of a step."""

    def __init__(self, config: Config, model: nn.Module, optimizers: Combined):
        schedule, steps = config.schedule, config.train.steps
        roles, end = list(optimizers.members), schedule.end(steps)
        self.config, self.optimizers = config, optimizers
        self.multipliers = {role: schedule.multiplier(role, steps) for role in roles}
        self.lines = {role: schedule.lines(role, steps) for role in roles}
        weights = dict(model.named_parameters())
        self.lookahead, self.average = None, None
        if config.lookahead.size:
            self.lookahead = Lookahead(config.lookahead, weights, schedule.multiplier("embedding", steps), end)
        if config.average.blend:
            averaged = {n: w for n, w in weights.items() if optimizers.roles[n] not in config.average.exclude}
            self.average = Average(config.average, averaged, end)

    @torch.no_grad()
    def start_step(self, step: int) -> dict[str, float]:
        """Returns role -> lr now in force."""
        if self.lookahead:
            self.lookahead.start_step(step)
        for role, lines in self.lines.items():
            for group in self.optimizers.members[role].param_groups:
                group.update({key: line(step) for key, line in lines.items()})
        return self.optimizers.set_lr({role: multiplier(step) for role, multiplier in self.multipliers.items()})

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        if self.lookahead:
            self.lookahead.end_step(step)
        if self.average:
            self.average.end_step(step)

    def eval_is_due(self, step: int) -> bool:
        return eval_is_due(self.config, step)

    @contextmanager
    def evaluated(self, step: int) -> Iterator[None]:
        """Around an evaluation of the weights after ``step`` updates."""
        with self.optimizers.averaged(), self.average.evaluated(step) if self.average else nullcontext():
            yield

    def state(self) -> dict[str, Tensor]:
        """Name -> live tensor, for checkpoints."""
        parts = {"lookahead": self.lookahead, "average": self.average}
        return {f"{kind}.{name}": t for kind, part in parts.items() if part for name, t in part.state.items()}
