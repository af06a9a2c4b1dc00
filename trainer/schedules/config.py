"""The sections `schedule`, `lookahead` and `average`.

A length up to 1 is a fraction of the schedule's horizon, above 1 a number of updates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from omegaconf import MISSING, OmegaConf

from common import UserError
from optim import schedule
from optim.by_name import BY_NAME
from optim.routing import ROLES, resolve_target
from optim.schedule import in_steps, is_length

SHAPE = ("name", "warmup", "decay", "final", "power")  # what a role may have of its own; its other keys are lines
Line = list[tuple[float, float]]


class Loss(StrEnum):
    mean = "mean"
    sum = "sum"


@dataclass
class ScheduleConfig:
    """Shapes: see ``optim/schedule.py``.

    A role's section has what is another for that role, such as ``matrix: {decay: 1.0}``, and other settings of its
    optimizer that change with the step, as points [length, value] with straight lines between them:
    ``matrix: {momentum: [[0, 0.85], [300, 0.95]]}``.
    """

    name: str = MISSING
    warmup: float = 0.0  # length of the rise from 0
    decay: float = 0.0  # length of the fall at the end
    final: float = 0.0  # multiplier of the learning rate at the end of the fall
    power: float = 1.0  # exponent of the fall, for power
    horizon: int | None = None  # update at which the fall ends; default: train.steps, which may lie before it
    matrix: dict[str, Any] = field(default_factory=dict)
    embedding: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    scalar: dict[str, Any] = field(default_factory=dict)

    def end(self, steps: int) -> int:
        """The horizon of a run of so many updates."""
        return self.horizon or steps

    def multiplier(self, role: str, steps: int) -> schedule.Schedule:
        """Of a role's learning rate, as a function of the step.  Raises ValueError: naming key and value."""
        shape = {key: getattr(self, key) for key in SHAPE}
        return schedule.build(**(shape | {k: v for k, v in getattr(self, role).items() if k in SHAPE}),
                              steps=self.end(steps))  # fmt: skip

    def lines(self, role: str, steps: int) -> dict[str, Callable[[int], float]]:
        """A role's other settings, as functions of the step."""
        points = {key: value for key, value in getattr(self, role).items() if key not in SHAPE}
        return {key: schedule.line(key, value, self.end(steps)) for key, value in points.items()}

    def early_end(self, steps: int) -> str | None:
        """One line where a run of so many updates ends long before its learning rate has fallen."""
        at, end = self.multiplier("matrix", steps), self.end(steps)
        if at(steps - 1) - at(end - 1) < 0.2:
            return None
        return (
            f"schedule.horizon={end}: the run ends after update {steps} with {at(steps - 1):.0%} of the learning rate; "
            "for a schedule that ends with the run give schedule.horizon=null"
        )

    def check(self, steps: int, settings: dict[str, dict[str, Any]]) -> None:
        """Raises UserError for what cannot be; ``settings`` of every role's optimizer."""
        if self.horizon is not None and self.horizon < steps:
            raise UserError(f"schedule.horizon={self.horizon}: give at least train.steps={steps}, or null for it")
        for role in ROLES:
            where = f"schedule.{role}." if getattr(self, role) else "schedule."
            try:
                self.multiplier(role, steps)
                lines = self.lines(role, steps)
            except (TypeError, ValueError) as error:
                raise UserError(f"{where}{error}") from None
            for key in lines:
                if key == "lr":
                    raise UserError(f"schedule.{role}.lr: the schedule sets it, by {', '.join(SHAPE)}")
                value = settings[role].get(key)
                if isinstance(value, bool) or not isinstance(value, int | float):
                    has = ", ".join([*SHAPE, *settings[role]])
                    raise UserError(f"schedule.{role}.{key}: its optimizer has no such number; there are {has}")
                for pattern, own in settings[role].get(BY_NAME, {}).items():
                    if key in own:
                        raise UserError(f"schedule.{role}.{key}: optim.{role}.{BY_NAME}.{pattern} has a fixed one; "
                                        "give one of the two")  # fmt: skip
            if lines:
                self._try_lines(role, lines, steps, settings[role])

    def _try_lines(
        self, role: str, lines: dict[str, Callable[[int], float]], steps: int, settings: dict[str, Any]
    ) -> None:
        """Raises UserError: in some update of the run the optimizer would refuse a value. What it takes at both ends of
        a line it takes in between, whole numbers alone excepted, which the update after the first end shows."""
        points = [in_steps(float(at), self.end(steps)) for key in lines for at, _ in getattr(self, role)[key]]
        for step in sorted({0, steps - 1} | {at + d for at in points for d in (-1, 0, 1) if 0 <= at + d < steps}):
            values = {key: line(step) for key, line in lines.items()}
            try:
                optimizer, arguments = resolve_target(settings | values, f"schedule.{role}")
                arguments.pop(BY_NAME, None)
                changing = try_optimizer(role, optimizer, arguments).param_groups[0]
            except Exception as error:  # of any author's class
                said = ", ".join(f"{key}={value:g}" for key, value in values.items())
                raise UserError(f"schedule.{role}: {said} in update {step}: {' '.join(str(error).split())}") from None
            for key in values:
                if key not in changing:
                    raise UserError(f"schedule.{role}.{key}: it cannot change during a run; give optim.{role}.{key}")


def try_optimizer(
    role: str, optimizer: type, arguments: dict[str, Any], own: dict[str, Any] | None = None
) -> torch.optim.Optimizer:
    """Build it and take a step with a small parameter: some settings contradict each other only there.  Of a group's
    ``own`` settings those of the parameter's layout are left out: they are for its shape."""
    arguments = arguments | {k: v for k, v in (own or {}).items() if k not in getattr(optimizer, "group_settings", {})}
    parameter = torch.nn.Parameter(torch.zeros(2) if role == "scalar" else torch.zeros(2, 2))
    parameter.grad = torch.zeros_like(parameter)
    built: torch.optim.Optimizer = optimizer([parameter], **arguments)
    built.step()
    return built


@dataclass
class LookaheadConfig:
    """W <- W + size r B before the gradient of an update from ``start`` to ``stop``, B <- decay B + (1 - decay) (change
    of W) after every update; W are all weights, r is the multiplier of the embedding's learning rate in the update
    before."""

    size: float = 0.0  # of the shift in mean changes of the weights; 0: none
    decay: float = 0.99  # of the mean
    start: float = 0.0  # length before the first shift
    stop: float = 1.0  # length before the shifts end

    def check(self) -> None:
        if not 0 <= self.size < math.inf:
            raise UserError(f"lookahead.size={self.size}: give 0, for none, or a number above it")
        _check_lengths("lookahead", self, "start", "stop")
        if not 0 <= self.decay < 1:
            raise UserError(f"lookahead.decay={self.decay}: give a number from 0 to below 1")


@dataclass
class AverageConfig:
    """E <- E + (W - E) / length after every update from ``start`` to ``stop``, from E = W; what is evaluated is
    (1 - blend) W + blend E, what is trained stays W."""

    blend: float = 0.0  # share of the average in what is evaluated; 0: no average is kept
    length: float = 1.0  # of the average
    start: float = 0.0  # length before the average begins
    stop: float = 1.0  # length before it ends
    exclude: list[str] = field(default_factory=list)  # roles that are not averaged

    def check(self) -> None:
        _check_lengths("average", self, "start", "stop", "length")
        if not 0 <= self.blend <= 1:
            raise UserError(f"average.blend={self.blend}: give a share from 0 to 1")
        if not self.length > 0:
            raise UserError(f"average.length={self.length}: give a length above 0")
        for role in self.exclude:
            if role not in ROLES:
                raise UserError(f"average.exclude={self.exclude}: choose from {', '.join(ROLES)}")


def _check_lengths(section: str, config: Any, *names: str) -> None:
    for name in names:
        if not is_length(value := getattr(config, name)):
            mend = "give a fraction of the run up to 1, or a whole number of updates"
            raise UserError(f"{section}.{name}={value}: {mend}")


def brought(config: Any) -> str | None:
    """One line where a record of track 3 trains a model that is not the track's: what it brings beside optimizers."""
    if not config.optim.name.startswith("track3_") or config.model.name.startswith("track3_"):
        return None
    keys = ("model.init", "train.loss", "schedule.name", "schedule.horizon", "lookahead.size", "average.blend")
    told = {key: OmegaConf.select(OmegaConf.structured(config), key) for key in keys}
    values = " ".join(f"{key}={value}" for key, value in told.items() if value)
    return f"optim={config.optim.name}, a record of track 3, brings to another model {values}; these keys change that"


def loss_scale(train: Any) -> int:
    """Of a TrainConfig: by what the mean loss is multiplied before it is differentiated."""
    return int(train.batch_tokens) if train.loss == Loss.sum else 1
