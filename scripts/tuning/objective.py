"""A trial as a training run: `Trainer.run()` is the objective, and reports every evaluation on its way."""

import gc
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from trainer.config import Config
from trainer.guard import DivergedError
from trainer.launch import load_config
from trainer.launch.processes import quoted
from trainer.loop import Trainer
from trainer.metrics import record
from trainer.run.preemption import Preempted

from .study import Job

RUN = ("run.resume=restart", "checkpoint.last=false")  # a killed one without a checkpoint begins anew


class TunedTrainer(Trainer):
    """Stops after an evaluation when ``report(step, val_loss)`` says so."""

    def __init__(self, config: Config, report: Callable[[int, float], bool]):
        self.report, self.stopped = report, False
        super().__init__(config)

    def evaluate(self) -> dict[str, float]:
        measured, step = super().evaluate(), self.progress.step
        if self.report(step, measured["val/loss"]) and step < self.config.train.steps:
            self.metrics.add(step, measured)
            self.stopped = True
            raise Preempted("successive halving")
        return measured


def split_words(words: Sequence[str], usual: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """A program's own settings, ``usual`` where they are not given, and the other words: the overrides of every run."""
    given = {key: value for key, _, value in (word.partition("=") for word in words) if key in usual}
    return usual | given, [word for word in words if word.partition("=")[0] not in usual]


def overrides_of(params: dict[str, object]) -> list[str]:
    """As one types them."""
    return [f"{key}={value!r}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()]


class Objective:
    """Trains trials in ``folder``, one directory each.

    Args:
        overrides: of all trials, as for train.py.
    """

    def __init__(self, folder: Path, overrides: Sequence[str]):
        self.folder, self.overrides = folder, list(overrides)

    def __call__(self, job: Job) -> None:
        name, plan = f"{job.study.name}-{job.trial.number}", job.plan
        own = [f"run.dir={quoted(str(self.folder / 'trials' / name))}", f"run.name={name}", *RUN]
        config = load_config([*self.overrides, f"optim={job.study.name}", *overrides_of(job.params), *own])
        job.trial.set_user_attr("lr", config.optim.matrix.get("lr"))
        print(f"{name}: {' '.join(overrides_of(job.params))}", flush=True)
        try:
            if not train(config, job.report):
                sys.exit(f"{name} was told to stop: start the same command again to go on")
        except DivergedError:
            job.report(job.last + plan.every, math.nan)  # what was begun of it counts
        shutil.rmtree(config.run.checkpoints, ignore_errors=True)  # a trial that was stopped has left one
        print(f"{name}: val loss {job.losses[job.last]:.4f} after {job.last} of {plan.steps} updates", flush=True)


def train(config: Config, report: Callable[[int, float], bool]) -> bool:
    """Train, telling the terminal nothing but faults; returns whether the run came to its end, or ``report`` did."""
    path = config.run.path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.with_suffix(".log").open("a") as log, redirect_stdout(log):
            trainer = TunedTrainer(config, report)
            trainer.run()
        return trainer.stopped or trainer.progress.step == config.train.steps
    finally:
        record.abandon()
        gc.collect()
