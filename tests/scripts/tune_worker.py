"""A process that does trials of a fake objective of milliseconds."""

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

from optuna.distributions import FloatDistribution

from scripts.tuning.study import Job, Plan, Study, work

PLAN = Plan(budget=3, steps=90, every=10, seed=3)
SPACE = {
    "optim.lr_scale": FloatDistribution(0.1, 10, log=True),
    "optim.matrix.momentum": FloatDistribution(0.8, 0.99),
}


def loss(params: dict[str, float], step: int) -> float:
    """Lowest at a scale of 1 and a momentum of 0.9; not a number above a scale of 8."""
    off = math.log(params["optim.lr_scale"]) ** 2 + 10 * (params["optim.matrix.momentum"] - 0.9) ** 2
    return math.nan if params["optim.lr_scale"] > 8 else 2 + off + 3 / math.sqrt(step)


def until(reports: int) -> Callable[[Job], None]:
    """An objective that waits to be killed after so many reports, however fast the machine; -1: never."""
    left = itertools.count(reports, -1)

    def limited(job: Job) -> None:
        for step in range(0, 91, 10):
            time.sleep(0.002 if next(left) else 600)
            if job.report(step, loss(job.params, step or 1)):
                return

    return limited


def studies(folder: Path) -> list[Study]:
    folder.mkdir(exist_ok=True)
    return [Study(folder, name, PLAN, SPACE) for name in ("a", "b")]


def main(folder: Path, reports: int = -1) -> None:
    """Do all trials; or as many reports as are given, and wait."""
    work(studies(folder), until(reports), lambda: time.sleep(0.02))


def trials(folder: Path) -> list[tuple]:
    """What was done: study, number, parameters, losses, state."""
    return [
        (study.name, t.number, t.params, t.intermediate_values, t.state.name)
        for study in studies(folder)
        for t in study.trials
    ]
