"""What a tuning has found: tune.md and tune.png in its folder."""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
import optuna
from optuna.trial import TrialState

from common import UserError, atomic_write, write_text

from .study import Plan, Study, open_storage, used

matplotlib.use("Agg")
NEAR = 0.01  # of the best loss: settings as good as the best, for all that a tuning may say


@dataclass(frozen=True)
class Tuned:
    """One optimizer: its study, and the best loss by budget [full runs' worth of updates]."""

    study: Study
    overrides: list[str]

    @property
    def name(self) -> str:
        return self.study.name

    def curve(self) -> list[tuple[float, float]]:
        """(budget used by then, lowest final loss by then) after every trial, infinite before the first full run."""
        trials = [t for t in self.study.trials if t.state.is_finished()]
        spent = accumulate(used(t) / self.study.plan.steps for t in trials)
        losses = [t.values[0] if t.state == TrialState.COMPLETE else math.inf for t in trials]
        return list(zip(spent, accumulate(losses, min), strict=True))

    def best_at(self, budget: float) -> float:
        return min((loss for spent, loss in self.curve() if spent <= budget + 1e-9), default=math.inf)

    def full_runs(self) -> list[tuple[float, float]]:
        """(learning rate of the matrices, final loss) of every full run."""
        trials = [t for t in self.study.trials if t.state == TrialState.COMPLETE and "lr" in t.user_attrs]
        return sorted((t.user_attrs["lr"], t.values[0]) for t in trials)


def read(folders: Sequence[Path]) -> list[Tuned]:
    """The studies of the folders.

    Raises UserError: one is none, or they were not tuned equally, and then nothing is compared.
    """
    found, plans = [], {}
    for folder in folders:
        if not (folder / "tune.db").exists():
            raise UserError(f"report={folder}: no tuning in it; give the folder of one")
        saved = read_plan(folder)
        plan = Plan(**{field.name: saved[field.name] for field in fields(Plan)})
        plans[str(folder)] = saved
        names = optuna.get_all_study_names(open_storage(folder))
        found += [Tuned(Study(folder, name, plan), saved["overrides"]) for name in names]
    for key, value in next(iter(plans.values())).items():
        if any(saved[key] != value for saved in plans.values()):
            said = ", ".join(f"{saved[key]} in {folder}" for folder, saved in plans.items())
            raise UserError(f"tuned unequally, so not compared: {key} is {said}; tune them alike, in one folder")
    if any(tuned.study.spent != tuned.study.plan.total for tuned in found):
        said = ", ".join(f"{t.name} {t.study.spent} of {t.study.plan.total}" for t in found)
        raise UserError(f"tuned unequally, so not compared: updates used: {said}; start the same command to finish")
    return found


def read_plan(folder: Path) -> dict[str, Any]:
    """tune.json of a study's folder.  Raises UserError: it is none."""
    try:
        saved = json.loads((folder / "tune.json").read_text(encoding="utf-8"))
        Plan(**{field.name: int(saved[field.name]) for field in fields(Plan)})
        list(saved["overrides"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}/tune.json is missing or damaged: give a tuning's folder, or a new one") from None
    return dict(saved)


def write(folders: Sequence[Path]) -> None:
    """Write tune.md and tune.png into the first folder, and print the table."""
    tuned = read(folders)
    text = to_markdown(tuned)
    write_text(folders[0] / "tune.md", text)
    with atomic_write(folders[0] / "tune.png") as file:
        file.write(draw(tuned))
    print(text)
    print(f"wrote {folders[0]}/tune.md, {folders[0]}/tune.png")
    final = folders[0] / "final"
    if any(final.glob("*/metrics.jsonl")):
        print(f"compare: python scripts/compare.py {final} --baseline {tuned[0].name} --out {final}")


def to_markdown(tuned: Sequence[Tuned]) -> str:
    plan = tuned[0].study.plan
    budgets = [b for b in (1, 2, 5, 10, 20, 50, 100, 200) if b < plan.budget] + [plan.budget]
    near_best = f"lr within {NEAR:.0%} of it"
    headings = ["optimizer", "trials", "of these full runs", *(f"best at {b}" for b in budgets), near_best]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    for t in sorted(tuned, key=lambda t: t.study.best.values[0]):
        losses = [f"{loss:.4f}" if math.isfinite(loss := t.best_at(b)) else "–" for b in budgets]
        near = [lr for lr, loss in t.full_runs() if loss <= (1 + NEAR) * t.study.best.values[0]]
        span = f"{min(near):.2g} to {max(near):.2g} ({len(near)} runs)" if near else "–"
        lines.append([t.name, str(len(t.study.trials)), str(len(t.full_runs())), *losses, span])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    best = "\n".join(f"python train.py {' '.join(t.overrides)} optim={t.name} {_params(t)}" for t in tuned)
    return (
        f"# Tuning: {plan.budget} full runs' worth of updates each\n\n{table}\n\n"
        f"Validation loss at the end of full runs of {plan.steps:,} updates, seed {plan.seed}: the best by budget (in "
        "full runs; a trial that was stopped early counts the updates that it used). The best of many trials with one "
        "seed flatters: what holds is the comparison on fresh seeds. The last column: learning rates of the matrices "
        f"in full runs with a loss at most {NEAR:.0%} above the best.\n\n```\n{best}\n```\n"
    )


def _params(tuned: Tuned) -> str:
    params = tuned.study.best.params.items()
    return " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params)


def draw(tuned: Sequence[Tuned]) -> bytes:
    """Best loss by budget, and the loss of full runs by learning rate, as a PNG."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for t in tuned:
        curve = [point for point in t.curve() if math.isfinite(point[1])]
        left.step(*zip(*curve, strict=True), where="post", label=t.name)
        right.plot(*zip(*t.full_runs(), strict=True), "o", label=t.name)
    left.set(xlabel="budget (full runs)", ylabel="best validation loss")
    right.set(xlabel="learning rate of the matrices", ylabel="validation loss of full runs", xscale="log")
    left.legend()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    pyplot.close(figure)
    return out.getvalue()
