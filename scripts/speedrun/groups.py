"""Decides which runs may stand beside each other.

Seeds of one optimizer setting make a group; whatever is not comparable is set aside with the reasons.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from .models import Header, alike, differences, unify, value
from .records import LOSS, SETTING, Run

UNITS = ("seconds", "steps", "tokens")
DIVERGED = "diverged"
MODEL = SETTING.index("model_hash")


class ComparisonError(ValueError):
    """The user asked for a baseline, or a model's setting, that these runs do not hold."""


@dataclass
class Group:
    """The seeds of one optimizer setting. Only `runs` enter means and tests; `aside` counts the others, and
    `diverged` those of them whose loss left the numbers."""

    label: str
    runs: list[Run] = field(default_factory=list)
    aside: int = 0
    diverged: int = 0

    @property
    def planned_steps(self) -> int:
        return self.runs[0].planned_steps

    @property
    def finals(self) -> list[float]:
        return [run.losses[-1] for run in self.runs]

    @property
    def devices(self) -> set[str | None]:
        return {run.device for run in self.runs}

    def curve(self, metric: str = LOSS) -> dict[str, list[float]]:
        """Mean, lowest and highest value of a metric at every step at which all the seeds that record it have one;
        NaN where one of theirs is not finite. Tokens and seconds are means too."""
        curves = [run.curves[metric] for run in self.runs if metric in run.curves]
        index = [{step: i for i, step in enumerate(curve.steps)} for curve in curves]
        shared = sorted(set.intersection(*(set(steps) for steps in index))) if index else []

        def columns(name: str) -> list[list[float]]:
            return [[getattr(c, name)[at[step]] for c, at in zip(curves, index, strict=True)] for step in shared]

        values = [c if all(map(math.isfinite, c)) else [math.nan] for c in columns("values")]
        return {
            "steps": shared,
            "tokens": [_mean(column) for column in columns("tokens")],
            "seconds": [_mean(column) for column in columns("seconds")],
            "mean": [_mean(column) for column in values],
            "low": [min(column) for column in values],
            "high": [max(column) for column in values],
        }


@dataclass
class Comparison:
    """`groups` are comparable with each other; `aside` holds every other run with the reasons why it is not.

    `across` has the settings in which the models may differ, and the value that each of the groups has.
    """

    setting: dict[str, Any]
    target: float | None
    groups: list[Group]
    aside: list[tuple[Run, list[str]]]
    baseline: Group | None = None
    across: dict[str, dict[str, Any]] = field(default_factory=dict)


def compare(
    runs: list[Run], target: float | None = None, baseline: str | None = None, across: Sequence[str] = ()
) -> Comparison:
    """Group the runs around one setting (model, data, batch) and one target.

    Both are those of the baseline's runs or, without a baseline, those of most runs. `target` replaces the
    target of every run. The models of different groups may differ in the settings `across`. Raises ComparisonError for
    a baseline without a comparable run, and for a setting that no model has.
    """
    models = unify(run.header for run in runs)
    _check(across, models)
    first = alike(models, across)

    def task(run: Run) -> tuple:
        return tuple(first.get(value, value) if i == MODEL else value for i, value in enumerate(run.setting))

    sound = [run for run in runs if not run.errors]
    voters = [run for run in sound if baseline in (run.label, _label_with_steps(run))] or sound
    setting = _most_common([task(run) for run in voters]) or (None,) * len(SETTING)
    recorded = target is None
    if recorded:
        target = _most_common([r.target for r in voters if task(r) == setting and r.target is not None])

    lengths = Counter(label for label, _ in {(run.label, run.planned_steps) for run in sound})
    groups: dict[str, Group] = {}
    aside = []
    for run in runs:
        label = _label_with_steps(run) if lengths[run.label] > 1 else run.label
        group = groups.setdefault(label, Group(label)) if label is not None else None
        reasons = [f"line {line}: {text}" if line else text for line, text in run.errors]
        if not reasons:
            reasons = _reasons(run, task(run), setting, target if recorded else run.target, models)
        if not reasons and group.runs:
            here, there = run.setting[MODEL], group.runs[0].setting[MODEL]
            reasons = _said(differences(models[here], models[there])) if here != there else []
        if not reasons and any(run.seed == other.seed for other in group.runs):
            reasons = [f"seed {run.seed} of {label} is there already; the same seed is not another sample"]
        if not reasons:
            group.runs.append(run)
            continue
        aside.append((run, reasons))
        if group and task(run) == setting:
            group.aside += 1
            group.diverged += any(reason.startswith(DIVERGED) for reason in reasons)

    usable = [group for group in groups.values() if group.runs]
    chosen = next((group for group in usable if group.label == baseline), None)
    if baseline is not None and chosen is None:
        names = ", ".join(group.label for group in usable) or "none"
        raise ComparisonError(
            f"--baseline {baseline}: no group of that name has a comparable run; groups here: {names}"
        )
    has = {key: {g.label: value(models.get(g.runs[0].setting[MODEL], {}), key) for g in usable} for key in across}
    return Comparison(dict(zip(SETTING, setting, strict=True)), target, usable, aside, chosen, has)


def _check(across: Sequence[str], models: dict[str, Header]) -> None:
    """Raises ComparisonError: a setting in which no two of the models differ."""
    pairs = (differences(a, b) for a, b in combinations(models.values(), 2))
    differ = sorted({key for found in pairs for key in found})
    if unknown := [key for key in across if key not in differ]:
        names = ", ".join(differ) or "none"
        raise ComparisonError(f"--across {','.join(unknown)}: the models here differ in: {names}; name those of them")


def _reasons(run: Run, task: tuple, setting: tuple, target: float | None, models: dict[str, Header]) -> list[str]:
    """Why a cleanly recorded run, of this task, cannot be compared; empty if it can."""
    pairs = dict(zip(SETTING, zip(task, setting, strict=True), strict=True))
    if task[MODEL] in models and setting[MODEL] in models:  # what differs in a hash, where it is known
        del pairs["model_hash"]
        pairs |= differences(models[task[MODEL]], models[setting[MODEL]])
    reasons = _said({key: pair for key, pair in pairs.items() if pair[0] != pair[1]})
    if run.target != target:
        reasons.append("no target" if run.target is None else f"target is {run.target:g}, the others' {target:g}")
    bad = [step for step, loss in zip(run.steps, run.losses, strict=True) if not math.isfinite(loss)]
    if bad:
        reasons.append(f"{DIVERGED}: the validation loss at step {bad[0]} is not a finite number")
    elif run.last_step < run.planned_steps and run.ends_broken:
        reasons.append(
            f"{DIVERGED}: its loss or gradient is not a finite number when it stops, at step {run.last_step}"
        )
    elif run.last_step < run.planned_steps:
        reasons.append(f"stopped early, at step {run.last_step} of {run.planned_steps}")
    elif run.steps[-1] < run.planned_steps:
        reasons.append(f"not evaluated at its end: last at step {run.steps[-1]} of {run.planned_steps}")
    return reasons


def _said(differ: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [f"{key} is {_text(mine)}, the others' {_text(theirs)}" for key, (mine, theirs) in differ.items()]


def _label_with_steps(run: Run) -> str:
    return f"{run.label} ({run.planned_steps} steps)"


def _text(value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value:,}" if type(value) is int else str(value)


def _most_common(values: list) -> Any:
    """The most frequent value, the earliest of equals; None of an empty list."""
    return Counter(values).most_common(1)[0][0] if values else None


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
