"""Reads `metrics.jsonl` records into runs and says, by line, what is wrong with them.

A record is one JSON object a line: a header `{"run": {...}}`, alone or on the line of step 0, events
(`{"event": ...}`), and metrics with `step`, `tokens`, `train_time_s` and, where an evaluation took place, `val/loss`.
Nothing else is read: a run is what its record says.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.metrics import jsonl

REQUIRED = ("optim", "model", "data", "seed", "steps")
# Runs that differ in one of these were not measured on the same task, whatever their optimizers.
SETTING = ("model", "data", "batch_tokens", "seq_len", "eval_tokens")
IDENTITY = ("group", "optim", "seed", *SETTING)
Remark = tuple[int | None, str]  # line number, if it is about one, and what is to be said


class RecordError(ValueError):
    """A path that the user named cannot be read or holds no record."""


@dataclass
class Run:
    """One record. `steps`, `tokens`, `seconds` and `losses` have one entry per evaluation, in order of steps.

    `faults` make the run unfit for statistics, `warnings` do not. `place` is the path to show.
    """

    path: Path
    place: str
    header: dict[str, Any] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    last_step: int = -1
    ends_broken: bool = False  # training loss or gradient norm of the last line is not a finite number
    faults: list[Remark] = field(default_factory=list)
    warnings: list[Remark] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.header.get("name") or Path(self.place).parent.name or self.place)

    @property
    def label(self) -> str | None:
        """What the run is a seed of: the header's group if it has one, else its optimizer with the overrides."""
        label = self.header.get("group") or self.header.get("optim")
        return None if label is None else str(label)

    @property
    def seed(self) -> Any:
        return self.header.get("seed")

    @property
    def target(self) -> float | None:
        return self.header.get("target")

    @property
    def planned_steps(self) -> int | None:
        return self.header.get("steps")

    @property
    def setting(self) -> tuple:
        values = (self.header.get(key) for key in SETTING)
        return tuple(json.dumps(v, sort_keys=True) if isinstance(v, (dict, list)) else v for v in values)

    @property
    def device(self) -> str | None:
        return " + ".join(self.devices) or None


def find_records(paths: list[Path]) -> list[tuple[Path, str]]:
    """Record files under `paths` (files, run directories or folders of them), each once, with the path to show.

    That path starts at the folder that the user named, so that a page passed on tells nothing about the machine
    it was made on. Raises RecordError where a path is missing or holds no record.
    """
    found: dict[Path, tuple[Path, str]] = {}
    for path in paths:
        if not path.exists():
            raise RecordError(f"{path}: no such file or directory")
        files = [path] if path.is_file() else sorted(file for file in path.rglob(jsonl.FILE) if file.is_file())
        if not files:
            raise RecordError(f"{path}: no {jsonl.FILE} in it or below it")
        top = path.resolve().name
        for file in files:
            found.setdefault(file.resolve(), (file, str(Path(top) / file.relative_to(path))))
    return list(found.values())


def read_run(path: Path, place: str) -> Run:
    """Read one record. A damaged line becomes a fault of the run; a torn last line only a warning."""
    run = Run(path, place)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from None
    for number, entry in _entries(raw, run):
        if isinstance(entry.get("run"), dict):
            _take_header(run, number, entry["run"])
        if "step" in entry:
            _take_metrics(run, number, entry)
        elif "event" not in entry and "run" not in entry:
            run.faults.append((number, "object with neither step, run nor event"))
    if not run.header:
        run.faults.append((None, "no header line: optimizer, model and data are unknown"))
    elif missing := [key for key in REQUIRED if run.header.get(key) is None]:
        run.faults.append((None, f"header lacks {', '.join(missing)}"))
    if not run.losses:
        run.faults.append((None, "no validation loss in it"))
    return run


def _entries(raw: bytes, run: Run) -> Iterator[tuple[int, dict]]:
    for number, entry, fault in jsonl.scan(raw):
        if entry is not None:
            yield number, entry
        else:
            (run.warnings if fault in (jsonl.EMPTY, jsonl.TORN) else run.faults).append((number, fault))


def _take_header(run: Run, number: int, header: dict) -> None:
    """The first header names the run; later ones (a resumed run's) may change its length, target and device."""
    changed = [key for key in IDENTITY if run.header and header.get(key) != run.header.get(key)]
    steps, target, device = header.get("steps"), header.get("target"), header.get("device")
    if changed:
        run.faults.append((number, f"a second run in the same record: {', '.join(changed)} changed"))
    elif steps is not None and not (_is_number(steps) and steps > 0):
        run.faults.append((number, f"header steps is {steps!r}, not a number of steps"))
    elif target is not None and not _is_number(target):
        run.faults.append((number, f"header target is {target!r}, not a loss"))
    else:
        run.header = {**run.header, **header}
        if device and str(device) not in run.devices:
            run.devices.append(str(device))


def _take_metrics(run: Run, number: int, entry: dict) -> None:
    step = entry["step"]
    if not _is_number(step) or step < 0 or step != int(step):
        run.faults.append((number, f"step is {step!r}, not a number of steps"))
        return
    step = int(step)
    if step < run.last_step:
        # A resumed run trains again what it had recorded after its last checkpoint; what it did in the end counts.
        text = f"goes back from step {run.last_step} to {step}: resumed; the later lines count"
        run.warnings.append((number, text))
        _forget_from(run, step)
    run.last_step = step
    run.ends_broken = any(key in entry and not _is_number(entry[key]) for key in ("train/loss", "grad_norm"))
    if "val/loss" in entry:
        _take_evaluation(run, number, step, entry)


def _take_evaluation(run: Run, number: int, step: int, entry: dict) -> None:
    # Strict JSON has no NaN: a writer may put null for a loss that has left the numbers.
    loss = math.nan if entry["val/loss"] is None else entry["val/loss"]
    if isinstance(loss, bool) or not isinstance(loss, (int, float)):
        run.faults.append((number, f"val/loss is {loss!r}, not a number"))
        return
    _forget_from(run, step)
    for key, curve in (("tokens", run.tokens), ("train_time_s", run.seconds)):
        value = entry.get(key)
        if not _is_number(value):
            run.faults.append((number, f"val/loss without a usable {key} ({value!r})"))
            return
        if curve and value < curve[-1]:
            run.faults.append((number, f"{key} falls from {curve[-1]:g} to {value:g} while the steps go on"))
    run.steps.append(step)
    run.tokens.append(float(entry["tokens"]))
    run.seconds.append(float(entry["train_time_s"]))
    run.losses.append(float(loss))


def _forget_from(run: Run, step: int) -> None:
    keep = sum(known < step for known in run.steps)
    for curve in (run.steps, run.tokens, run.seconds, run.losses):
        del curve[keep:]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
