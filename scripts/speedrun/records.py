"""Reads `metrics.jsonl` records into runs and says, by line, what is wrong with them.

A record is one JSON object a line: a header `{"run": {...}}`, alone or on the line of step 0, events
(`{"event": ...}`), and metrics with `step`, `tokens`, `train_time_s` and, where an evaluation took place, `val/loss`.
Every other number on such a line is a metric too. Nothing else is read: a run is what its record says.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.metrics import jsonl
from trainer.metrics.summary import AXES

from .models import same_model

LOSS = "val/loss"
REQUIRED = ("optim", "model", "data", "seed", "steps")
# Runs that differ in one of these were not measured on the same task, whatever their optimizers.
SHOWN = ("model", "data", "batch_tokens", "seq_len", "eval_tokens")
SETTING = (*SHOWN, "model_hash", "data_hash", "precision")
LARGEST = 1e100
IDENTITY = ("group", "optim", "seed", *SETTING)
Remark = tuple[int | None, str]  # line number, if it is about one, and what is to be said


class RecordError(ValueError):
    """A path that the user named cannot be read or holds no record."""


@dataclass
class Curve:
    """One metric of a run: its values in order of steps, and where in training they were measured. NaN stands for
    null and whatever else is no finite number."""

    steps: list[int] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def append(self, step: int, tokens: float, seconds: float, value: float | None) -> None:
        """Of two values at one step the later counts."""
        self.forget_from(step)
        self.steps.append(step)
        self.tokens.append(float(tokens))
        self.seconds.append(float(seconds))
        self.values.append(float(value) if _is_number(value) else math.nan)

    def forget_from(self, step: int) -> None:
        while self.steps and self.steps[-1] >= step:
            for column in (self.steps, self.tokens, self.seconds, self.values):
                column.pop()


@dataclass
class Run:
    """One record. `steps`, `tokens`, `seconds` and `losses` are those of its evaluations, `curves` has every metric.

    `errors` make the run unfit for statistics, `warnings` do not. `shown_path` tells nothing about the machine.
    """

    path: Path
    shown_path: str
    header: dict[str, Any] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=lambda: {LOSS: Curve()})
    last_step: int = -1
    ends_broken: bool = False  # training loss or gradient norm of the last line is not a finite number
    errors: list[Remark] = field(default_factory=list)
    warnings: list[Remark] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return self.curves[LOSS].steps

    @property
    def tokens(self) -> list[float]:
        return self.curves[LOSS].tokens

    @property
    def seconds(self) -> list[float]:
        return self.curves[LOSS].seconds

    @property
    def losses(self) -> list[float]:
        return self.curves[LOSS].values

    @property
    def name(self) -> str:
        return str(self.header.get("name") or Path(self.shown_path).parent.name or self.shown_path)

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


def read_run(path: Path, shown_path: str) -> Run:
    """Read one record. A damaged line becomes an error of the run; a torn last line only a warning."""
    run = Run(path, shown_path)
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
            run.errors.append((number, "object with neither step, run nor event"))
    if not run.header:
        run.errors.append((None, "no header line: optimizer, model and data are unknown"))
    elif missing := [key for key in REQUIRED if run.header.get(key) is None]:
        run.errors.append((None, f"header lacks {', '.join(missing)}"))
    if not run.losses:
        run.errors.append((None, "no validation loss in it"))
    return run


def _entries(raw: bytes, run: Run) -> Iterator[tuple[int, dict]]:
    for number, entry, fault in jsonl.scan(raw):
        if entry is not None:
            yield number, entry
        else:
            (run.warnings if fault in (jsonl.EMPTY, jsonl.TORN) else run.errors).append((number, fault))


def _take_header(run: Run, number: int, header: dict) -> None:
    """The first header names the run; later ones (a resumed run's) may change its length, target and device."""
    # Half of a surrogate pair, as a label cut in the middle has it, is in no file and on no picture.
    header = {k: v.encode(errors="replace").decode() if isinstance(v, str) else v for k, v in header.items()}
    changed = [key for key in IDENTITY if run.header and header.get(key) != run.header.get(key)]
    if "model_hash" in changed and same_model(header, run.header):  # its class has settings now that it had not then
        changed.remove("model_hash")
    steps, target, device = header.get("steps"), header.get("target"), header.get("device")
    if changed:
        run.errors.append((number, f"a second run in the same record: {', '.join(changed)} changed"))
    elif steps is not None and not (_is_number(steps) and steps > 0):
        run.errors.append((number, f"header steps is {_short(steps)}, not a number of steps"))
    elif target is not None and not _is_number(target):
        run.errors.append((number, f"header target is {_short(target)}, not a loss"))
    else:
        run.header = {**run.header, **header}
        if device and str(device) not in run.devices:
            run.devices.append(str(device))


def _take_metrics(run: Run, number: int, entry: dict) -> None:
    step = entry["step"]
    if not _is_number(step) or step < 0 or step != int(step):
        run.errors.append((number, f"step is {_short(step)}, not a number of steps"))
        return
    step = int(step)
    if (length := run.header.get("steps")) is not None and step > length:
        run.errors.append((number, f"step {_short(step)} is beyond the run's {length} steps"))
        return
    if step < run.last_step:
        # A resumed run trains again what it had recorded after its last checkpoint; what it did in the end counts.
        text = f"goes back from step {run.last_step} to {step}: resumed; the later lines count"
        run.warnings.append((number, text))
        for curve in run.curves.values():
            curve.forget_from(step)
    run.last_step = step
    run.ends_broken = any(key in entry and not _is_number(entry[key]) for key in ("train/loss", "grad_norm"))
    if LOSS in entry:
        _take_evaluation(run, number, step, entry)
    if _is_number(entry.get("tokens")) and _is_number(entry.get("train_time_s")):
        _take_other_metrics(run, step, entry)


def _short(value: object) -> str:
    """As a message shows a value that may be of any length."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _take_evaluation(run: Run, number: int, step: int, entry: dict) -> None:
    # Strict JSON has no NaN: a writer may put null for a loss that has left the numbers.
    loss, curve = entry[LOSS], run.curves[LOSS]
    if not _is_metric(loss):
        run.errors.append((number, f"{LOSS} is {_short(loss)}, not a number"))
        return
    curve.forget_from(step)
    for key, known in (("tokens", curve.tokens), ("train_time_s", curve.seconds)):
        value = entry.get(key)
        if not _is_number(value):
            run.errors.append((number, f"{LOSS} without a usable {key} ({_short(value)})"))
            return
        if known and value < known[-1]:
            run.errors.append((number, f"{key} falls from {known[-1]:g} to {value:g} while the steps go on"))
    curve.append(step, entry["tokens"], entry["train_time_s"], loss)


def _take_other_metrics(run: Run, step: int, entry: dict) -> None:
    for key, value in entry.items():
        if key not in (LOSS, *AXES.values()) and _is_metric(value):
            run.curves.setdefault(key, Curve()).append(step, entry["tokens"], entry["train_time_s"], value)


def _is_metric(value: Any) -> bool:
    """Whether it is a number, or null in the place of one that was not finite."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, and its square is one too; a whole one may be too large for any."""
    return value is not None and _is_metric(value) and abs(value) <= LARGEST
