"""Our own CPU track as a small file: one line per optimizer and evaluation, means over its seeds.

`python scripts/lecture/run.py figure=speedrun records=FOLDER_OF_RUNS` writes it, and draws it.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from scripts.lecture.style import write
from scripts.speedrun.groups import compare
from scripts.speedrun.records import find_records, read_run

FILE = Path(__file__).resolve().parents[3] / "docs" / "results" / "cpu_curves.csv"
COLUMNS = ("optimizer", "seeds", "step", "seconds", "loss")


@dataclass(frozen=True)
class Curve:
    """Mean validation loss over the seeds of one optimizer; `seconds` are of training, evaluations left out."""

    optimizer: str
    seeds: int
    steps: list[int]
    seconds: list[float]
    losses: list[float]


def write_curves(records: Path, file: Path = FILE) -> int:
    """Write the curves of every run below `records`; returns how many runs were left out as not comparable.

    Which runs those are is decided as by scripts/compare.py, which also says why.
    """
    comparison = compare([read_run(path, place) for path, place in find_records([records])])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for group in comparison.groups:
        curve = group.curve()
        for step, seconds, loss in zip(curve["steps"], curve["seconds"], curve["mean"], strict=True):
            writer.writerow([group.label, len(group.runs), step, f"{seconds:.2f}", f"{loss:.5f}"])
    write(file, out.getvalue().encode())
    return len(comparison.aside)


def read_curves(file: Path = FILE) -> list[Curve]:
    """Best first; empty where there is no such file."""
    lines: dict[tuple[str, int], list[dict]] = {}
    if file.exists():
        for line in csv.DictReader(file.read_text().splitlines()):
            lines.setdefault((line["optimizer"], int(line["seeds"])), []).append(line)
    curves = [
        Curve(
            *key,
            [int(line["step"]) for line in group],
            [float(line["seconds"]) for line in group],
            [float(line["loss"]) for line in group],
        )
        for key, group in lines.items()
    ]
    return sorted(curves, key=lambda curve: curve.losses[-1])
