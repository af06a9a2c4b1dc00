"""The trials of one optimizer, in SQLite: several processes do a part each, and any of them may be killed.

The budget is counted in updates. A trial takes, before it starts, as many as a full run has, or what is left; when it
is stopped it gives back what it has not used. So all trials together use exactly the budget. Whoever does a trial holds
a file lock, which the system lets go when it dies: the trial then waits to be done again, under its number and with
its parameters, and counts once.
"""

import fcntl
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from common import UserError

from .space import Space

HALVING = 3  # of the trials that reach a rung, one in so many goes on to the next, at so many times the updates
optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Plan:
    """What all optimizers of a comparison have in common."""

    budget: int  # full runs' worth of updates, for each optimizer
    steps: int  # updates of a full run
    every: int  # updates between evaluations, a divisor of ``steps``
    seed: int = 0  # of the sampler

    @property
    def total(self) -> int:
        """Updates for each optimizer."""
        return self.budget * self.steps

    @property
    def rungs(self) -> list[int]:
        """Updates after which a trial may be stopped: about a ninth and a third of a run, at evaluations."""
        first = self.every * math.ceil(self.steps / self.every / HALVING**2)
        return [rung for rung in (first, first * HALVING) if rung < self.steps]


def used(trial: FrozenTrial) -> int:
    """Updates of a trial: up to its last evaluation."""
    return max(trial.intermediate_values, default=0)


class Study:
    """One optimizer's.

    Args:
        folder: of the database and the locks; the optimizers of a comparison share it.
        name: of the optimizer.
        space: of its search; may be left out to read only.
    """

    def __init__(self, folder: Path, name: str, plan: Plan, space: Space | None = None):
        self.folder, self.name, self.plan, self.space = folder, name, plan, space or {}
        with locked(folder):
            self.storage = open_storage(folder)
            self.study = optuna.create_study(
                storage=self.storage, study_name=name, direction="minimize", load_if_exists=True
            )

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    @property
    def spent(self) -> int:
        """Updates of the trials that have ended."""
        return sum(used(trial) for trial in self.trials if trial.state.is_finished())

    @property
    def best(self) -> FrozenTrial:
        """Of the full runs. Raises UserError: there is none."""
        full = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        if not full:
            raise UserError(f"optim={self.name}: no trial came to its end; narrow optim.tune, or give a larger budget")
        return min(full, key=lambda trial: trial.values[0])

    def take(self) -> "Job | None":
        """A trial to do, whose lock is held; None while all of the budget is used or taken."""
        with locked(self.folder):
            self._requeue()
            trials = self.trials
            left = self.plan.total - sum(used(t) for t in trials if t.state.is_finished())
            left -= sum(t.user_attrs["allowance"] for t in trials if t.state == TrialState.RUNNING)
            if left < self.plan.every:
                return None
            trial = self.study.ask()  # one that waits, or a new one
            lock = hold(self.folder, f"{self.name}-{trial.number}")
            assert lock, "nobody else holds a trial that is taken here"
            for key, distribution in self.space.items():
                # The same trial whenever and by whomever it is sampled, also half of it before a kill.
                seed = zlib.crc32(f"{self.plan.seed} {trial.number} {key}".encode())
                self.study.sampler = TPESampler(seed=seed)
                suggest(trial, key, distribution)
            trial.set_user_attr("allowance", min(self.plan.steps, left))
            waited = next((t for t in trials if t.number == trial.number), None)
            return Job(self, trial, min(self.plan.steps, left), lock, waited.intermediate_values if waited else {})

    def promotes(self, step: int, loss: float) -> bool:
        """Asynchronous successive halving (Li et al., arXiv 1810.05934): whether a loss is among the best third of
        those that are there, itself included; of the first one or two, whether it is the best.

        A function of the losses alone: who is killed and asks again is told the same. (Optuna's pruner also writes down
        that it was asked.)
        """
        losses = [t.intermediate_values[step] for t in self.trials if step in t.intermediate_values]
        there = sorted(loss for loss in losses if math.isfinite(loss))
        return loss <= there[max(len(there) // HALVING, 1) - 1]

    def _requeue(self) -> None:
        """Let the trials wait again whose process has died."""
        for trial in self.trials:
            if trial.state == TrialState.RUNNING and (lock := hold(self.folder, f"{self.name}-{trial.number}")):
                with lock:
                    now = self.storage.get_trial(trial._trial_id)  # no public name; it may have ended by itself since
                    if now.state == TrialState.RUNNING:
                        self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


class Job:
    """One trial in the hands of one process.

    Args:
        allowance: updates that it may use.
        losses: by updates, what was reported before its process was killed.
    """

    def __init__(self, study: Study, trial: optuna.Trial, allowance: int, lock: IO[str], losses: dict[int, float]):
        self.plan, self.study, self.trial, self.allowance, self.lock = study.plan, study, trial, allowance, lock
        self.losses = dict(losses)

    @property
    def params(self) -> dict[str, Any]:
        return self.trial.params

    @property
    def last(self) -> int:
        return max(self.losses, default=0)

    def report(self, step: int, loss: float) -> bool:
        """Note the validation loss after ``step`` updates; returns whether to stop.  Only multiples of ``plan.every``
        count: a run may be evaluated in between."""
        if step % self.plan.every or step == 0 or step < self.last:
            return False
        if step > self.last:
            self.losses[step] = loss
            self.trial.report(loss, step)
        if step >= self.allowance or not math.isfinite(self.losses[step]):
            return True
        return step in self.plan.rungs and not self.study.promotes(step, self.losses[step])

    def finish(self) -> None:
        """Tell the study that the trial has ended, after its last report."""
        whole = self.last == self.plan.steps and math.isfinite(self.losses[self.last])
        state = TrialState.COMPLETE if whole else TrialState.PRUNED
        self.study.study.tell(self.trial, self.losses[self.last] if whole else None, state)
        self.lock.close()


def work(studies: list[Study], objective: Callable[[Job], None], wait: Callable[[], None]) -> None:
    """Do trials until every study has used its budget; ``wait`` is called where only other processes' trials are left.

    The studies take turns, so that what a slow hour costs is shared.

    Args:
        objective: trains, and calls ``job.report`` after every evaluation until that says to stop.
    """
    while any(study.spent < study.plan.total for study in studies):
        jobs = 0
        for study in studies:
            if job := study.take():
                jobs += 1
                if not (job.last and job.report(job.last, job.losses[job.last])):  # or a kill came after its end
                    objective(job)
                job.finish()
        if not jobs:
            wait()


def suggest(trial: optuna.Trial, key: str, distribution: Any) -> None:
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(key, distribution.choices)
    else:
        assert isinstance(distribution, FloatDistribution)
        trial.suggest_float(key, distribution.low, distribution.high, log=distribution.log)


def open_storage(folder: Path) -> RDBStorage:
    return RDBStorage(f"sqlite:///{folder / 'tune.db'}", engine_kwargs={"connect_args": {"timeout": 120}})


def hold(folder: Path, name: str) -> IO[str] | None:
    """A lock, held until the file is closed or the process ends; None if another one holds it."""
    path = folder / ".locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time in this block."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
