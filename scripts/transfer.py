"""Which learning rate is best at which width: a grid of runs, in standard parametrisation and in muP.

    python scripts/transfer.py experiment=cpu_transfer                 # the same command goes on with what is missing
    python scripts/transfer.py experiment=cpu_transfer report=true     # what there is, without training

optim    presets                                     (default: adamw,muon,muonh,soap)
param    parametrisations                            (default: standard,mup)
widths   model.n_embd; the first is muP's base       (default: 64,128,256)
depths   model.n_layer                               (default: 1,2)
lr       factors of all learning rates               (default: 0.25,0.5,1,2,4,8)
decay    weight decays of the matrices               (default: the preset's)
seeds    of the runs                                 (default: 1,2,3)
head_dim n_embd / n_head of all models               (default: 32)
folder   of the study; several processes may work in it at once   (default: runs/transfer)
Everything else is as for train.py.  docs/compare.md says what is done.
"""

import json
import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scaling import report  # noqa: E402
from scaling.grid import Cell, Results, cells  # noqa: E402
from tuning.objective import split_words, train  # noqa: E402
from tuning.study import hold, locked  # noqa: E402

from common import UserError, write_json  # noqa: E402
from trainer.config import world_size  # noqa: E402
from trainer.guard import DivergedError  # noqa: E402
from trainer.launch import load_config  # noqa: E402
from trainer.launch.processes import quoted  # noqa: E402
from trainer.metrics.jsonl import FILE, read_lines  # noqa: E402

OWN = {"optim": "adamw,muon,muonh,soap", "param": "standard,mup", "widths": "64,128,256", "depths": "1,2",
       "lr": "0.25,0.5,1,2,4,8", "decay": "", "seeds": "1,2,3", "head_dim": "32", "folder": "runs/transfer",
       "report": "false"}  # fmt: skip
KINDS = {"optim": str, "param": str, "widths": int, "depths": int, "lr": float, "decay": float, "seeds": int}
MEASURED = 12  # updates of a run that only measures: SOAP's new bases every tenth are in it


def main(words: list[str]) -> int:
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    own = OWN
    try:
        own, overrides = split(words)
        study = Study(own, overrides)
        if own["report"] != "true":
            study.settle()
            study.run()
        report.write(study.folder, study.axes, study.base, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: folder={own['folder']}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """What is this program's own, and the overrides of every run."""
    own, overrides = split_words(words, OWN)
    if world_size() > 1:
        raise UserError(f"WORLD_SIZE={world_size()}: a run trains in one process; start transfer.py without torchrun")
    taken = ("run.", "hydra", "-", "seed=", "model.n_", "model.param", "model.base_", "optim.lr_scale")
    if wrong := [word for word in overrides if word.startswith(taken)]:
        raise UserError(f"{' '.join(wrong)}: the grid sets it; give {', '.join(OWN)}")
    return own, overrides


def values(own: dict[str, str], key: str) -> list[Any]:
    """Raises UserError: the key, and what it takes."""
    kind = KINDS[key]
    try:
        found = [kind(word) for word in own[key].split(",")]
    except ValueError:
        found = []
    positive = kind is str or all(math.isfinite(value) and value >= (key in ("widths", "depths")) for value in found)
    if not found or not positive or len(set(found)) < len(found) or (key == "lr" and min(found) <= 0):
        what = {str: "names", int: "whole numbers", float: "numbers"}[kind]
        raise UserError(f"{key}={own[key]}: give different {what}, with commas between, such as {OWN[key] or '0.1'}")
    return found


class Study:
    """The grid, in its folder."""

    def __init__(self, own: dict[str, str], overrides: list[str]):
        self.folder, self.overrides = Path(own["folder"]), overrides
        self.axes = {key: values(own, key) for key in KINDS if key != "decay"}
        self.axes["decay"] = values(own, "decay") if own["decay"] else [None]
        if unknown := set(self.axes["param"]) - {"standard", "mup"}:
            raise UserError(f"param={','.join(sorted(unknown))}: choose of standard, mup")
        self.head_dim = int(own["head_dim"]) if own["head_dim"].isdecimal() else 0
        if not self.head_dim or any(width % self.head_dim for width in self.axes["widths"]):
            raise UserError(f"head_dim={own['head_dim']}: give a number that divides widths={own['widths']}")
        self.axes["widths"].sort()
        self.base, self.results = self.axes["widths"][0], Results(self.folder)
        self.cells = cells(self.axes, self.base)

    def settle(self) -> None:
        """Note in the folder what it is a study of; the grid may grow.  Raises UserError: of another one."""
        for optim in self.axes["optim"]:  # a mistake is told before anything is there
            self.config(next(cell for cell in self.cells if cell.optim == optim), "runs")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "transfer.json"
        mine = {"overrides": sorted(self.overrides), "base_width": self.base, "head_dim": self.head_dim}
        with locked(self.folder):
            if not path.exists():
                write_json(path, mine)
            theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs != mine:
            raise UserError(f"folder={self.folder} holds another study, {theirs}; choose another folder")

    def config(self, cell: Cell, kind: str, *more: str) -> Any:
        own = [f"run.dir={quoted(str(self.folder / kind / cell.name))}", f"run.name='{cell.name}'"]
        own += ["run.resume=restart", *cell.overrides(self.base, self.head_dim), "checkpoint.last=false", *more]
        return load_config([*self.overrides, *own])

    def run(self) -> None:
        """Every cell that is not there yet; what another process does is its own."""
        left = [cell for cell in self.cells if self.results.read(cell) is None]
        print(f"{len(left)} of {len(self.cells)} runs are to be done", flush=True)
        if not left:
            return
        print(f"projected: {self.projected(left) / 60:.0f} minutes in one process, from measured steps", flush=True)
        for i, cell in enumerate(left, 1):
            lock = hold(self.folder, cell.name)
            if lock is None or self.results.read(cell):
                continue
            config, begun = self.config(cell, "runs"), (time.perf_counter(), time.process_time())
            loss = self.train(config)
            cost = time.perf_counter() - begun[0], time.process_time() - begun[1]
            self.results.write(cell, loss, config.optim.matrix.get("lr"), *cost)
            print(f"{i}/{len(left)} {cell.name}: val loss {loss:.4f}", flush=True)
            lock.close()

    def train(self, config: Any) -> float:
        """The last validation loss, NaN where the run diverged.  Raises SystemExit: it was told to stop."""
        losses = [math.nan]
        try:
            if not train(config, lambda _, loss: losses.append(loss)):
                sys.exit("told to stop: start the same command again to go on")
        except DivergedError:
            return math.nan
        return losses[-1]

    def projected(self, left: list[Cell]) -> float:
        """Seconds of the cells in one process: by runs of the same size that are there, else by a few updates."""
        known: dict[str, list[float]] = {}
        for cell in self.cells:
            if found := self.results.read(cell):
                known.setdefault(cell.cost_class, []).append(found["seconds"])
        for cell in left:
            if cell.cost_class not in known:
                known[cell.cost_class] = [self.measure(cell)]
        return sum(median(known[cell.cost_class]) for cell in left)

    def measure(self, cell: Cell) -> float:
        """Seconds of a whole run, from one of ``MEASURED`` updates."""
        whole = self.config(cell, "measured").train.steps
        few = min(MEASURED, whole)
        config = self.config(cell, "measured", f"train.steps={few}", f"eval.every={few}", "logger.every=1")
        start = time.perf_counter()
        self.train(config)
        lines = [line["train_time_s"] for line in read_lines(config.run.path / FILE) if line["step"]]
        step = (lines[-1] - lines[0]) / (len(lines) - 1) if len(lines) > 1 else 0.0
        return time.perf_counter() - start + (whole - few) * step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
