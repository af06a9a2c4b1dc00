"""What the page's script draws, as one JSON value: groups, runs, published figures and their curves.

`metrics` names what can be drawn, val/loss first; `curves` of a group or run has one entry per metric, null where it
has none. A curve's `axis` is its place in `axes`, since metrics that were written on the same lines share their steps.
"""

import math
from pathlib import Path
from typing import Any

from . import table
from .groups import UNITS, Comparison, Group
from .records import LOSS, Run
from .statistics import CONFIDENCE
from .style import SHAPES, looks
from .table import Row

MOST_POINTS = 200  # of a curve, so that 100 long runs with ten metrics stay below ten megabytes

Columns = dict[str, list[float]]


def build(comparison: Comparison, rows: list[Row], published: list[dict[str, Any]]) -> dict[str, Any]:
    baseline = comparison.baseline.label if comparison.baseline else None
    runs = [(run, i, []) for i, row in enumerate(rows) for run in row.group.runs]
    runs += [(run, None, reasons) for run, reasons in comparison.aside]
    look = looks([row.label for row in rows] + [str(run.label) for run, _, _ in runs], baseline)
    metrics = _metrics([run for run, _, _ in runs])
    axes: dict[tuple, int] = {}
    place = {Path(run.shown_path).parent.name: i for i, (run, _, _) in enumerate(runs)}
    return {
        "target": comparison.target,
        "baseline": baseline,
        "confidence": f"{CONFIDENCE:.0%}",
        "one_device": len({device for row in rows for device in row.group.devices}) <= 1,
        "metrics": metrics,
        "groups": [
            {**_group(row, look[row.label]), "curves": [_group_curve(row.group, metric, axes) for metric in metrics]}
            for row in rows
        ],
        "runs": [
            {
                **_run(run, look[str(run.label) if group is None else rows[group].label]),
                "branch": _branch(run, place),
                "group": group,
                "reasons": reasons,
                "curves": [_run_curve(run, metric, axes) for metric in metrics],
            }
            for run, group, reasons in runs
        ],
        "axes": [dict(zip(UNITS, axis, strict=True)) for axis in axes],
        "published": published,
    }


def _metrics(runs: list[Run]) -> list[str]:
    """val/loss, and every other key with a finite value in at least one run."""
    found = {key for run in runs for key, curve in run.curves.items() if any(map(math.isfinite, curve.values))}
    return [LOSS, *sorted(found - {LOSS})]


def _group(row: Row, look: tuple[int, int]) -> dict[str, Any]:
    hit = {
        unit: {"value": cost.mean, "error": cost.error, "text": f"{unit}: {table.amount(cost, unit)}"}
        for unit, cost in row.interpolated.items()
        if cost
    }
    return {
        "label": row.label,
        "seeds": row.final.n,
        "colour": look[0],
        "shape": SHAPES[look[1]][0],
        "outline": SHAPES[look[1]][2],
        "hit": hit or None,
        "ratio": {unit: [r.value, r.low, r.high] for unit, r in row.speedup.items() if r},
    }


def _run(run: Run, look: tuple[int, int]) -> dict[str, Any]:
    return {
        "name": run.name,
        "label": run.label or "unknown optimizer",
        "colour": look[0],
        "shape": SHAPES[look[1]][0],
        "seed": "–" if run.seed is None else str(run.seed),
        "details": [str(value) for value in (*run.setting[:2], run.device) if value is not None],
        "shown_path": run.shown_path,
        "planned": run.planned_steps,
    }


def _branch(run: Run, place: dict[str, int]) -> dict[str, Any] | None:
    """Where a run left its trunk, and that one's place in the list, None if it is not on the page."""
    trunk, at, step = str(run.header.get("branch") or "").rpartition("@")
    return {"of": trunk, "step": int(step), "trunk": place.get(trunk)} if at and step.isdecimal() else None


def _group_curve(group: Group, metric: str, axes: dict[tuple, int]) -> dict[str, Any] | None:
    curve = group.curve(metric)
    values = {"values": curve["mean"], "low": curve["low"], "high": curve["high"]}
    drawn = _curve(curve, values, axes)
    return drawn and {**drawn, "seeds": sum(metric in run.curves for run in group.runs)}


def _run_curve(run: Run, metric: str, axes: dict[tuple, int]) -> dict[str, Any] | None:
    curve = run.curves.get(metric)
    return curve and _curve(vars(curve), {"values": curve.values}, axes)


def _curve(curve: Columns, values: Columns, axes: dict[tuple, int]) -> dict[str, Any] | None:
    kept = thin(values["values"])
    if not kept:
        return None
    axis = tuple(tuple(_rounded([curve[unit][i] for i in kept])) for unit in UNITS)
    drawn = {name: _rounded([column[i] for i in kept]) for name, column in values.items()}
    return {"axis": axes.setdefault(axis, len(axes)), **drawn}


def thin(values: list[float], most: int = MOST_POINTS) -> list[int]:
    """Indices of at most `most` values that look like all of them: first, last, and the lowest and highest of each of
    equal stretches, so that a spike is never lost. A stretch with a value that is not finite keeps one as its highest,
    which leaves a gap in the line."""
    if len(values) <= most:
        return list(range(len(values)))
    stretches = most // 2 - 1
    kept = {0, len(values) - 1}
    for k in range(stretches):
        stretch = range(k * len(values) // stretches, (k + 1) * len(values) // stretches)
        kept.add(min(stretch, key=lambda i: values[i] if math.isfinite(values[i]) else math.inf))
        kept.add(max(stretch, key=lambda i: values[i] if math.isfinite(values[i]) else math.inf))
    return sorted(kept)


def _rounded(values: list[float]) -> list[float | None]:
    """Seven digits; whole numbers in full and without a point, which is shorter."""
    return [None if not math.isfinite(v) else int(v) if v == int(v) and abs(v) < 2**53 else float(f"{v:.7g}")
            for v in values]  # fmt: skip
