"""The table of a comparison: one row per group, as numbers, as CSV and as the cells that Markdown and the page share."""

import csv
import io
import math
from dataclasses import dataclass

from . import statistics
from .groups import UNITS, Comparison, Group
from .statistics import Crossing, Estimate, Ratio


@dataclass
class Row:
    """What is known of one group. Unless every seed reached the target, the costs to the target are None: dropping the
    seeds that failed would flatter the group. `seconds` are compared only between runs on the same device."""

    group: Group
    final: Estimate
    crossings: dict[str, list[Crossing | None]]
    interpolated: dict[str, Estimate | None]
    first: dict[str, Estimate | None]
    speedup: dict[str, Ratio | None]
    same_device: bool = True
    p_target: float | None = None
    z_target: float | None = None
    p_baseline: float | None = None
    p_holm: float | None = None
    z_baseline: float | None = None

    @property
    def reached(self) -> int:
        return sum(crossing is not None for crossing in self.crossings["steps"])


def build(comparison: Comparison, sigma: float | None = None, loss_per_step: float = 0) -> list[Row]:
    """Rows, fastest to the target first; `sigma` adds the known-σ tests and `loss_per_step` their price of a step."""
    target, baseline = comparison.target, comparison.baseline
    rows = [_costs(group, target) for group in comparison.groups]
    reference = next((row for row in rows if row.group is baseline), None)
    for row in rows:
        finals = row.group.finals
        if target is not None:
            row.p_target = statistics.below_target(finals, target)
            row.z_target = statistics.z_below_target(finals, target, sigma) if sigma else None
        if reference is not None and row is not reference:
            _against(row, reference, sigma, loss_per_step)
    others = [row for row in rows if row is not reference]
    for row, p in zip(others, statistics.holm([row.p_baseline for row in others]), strict=True):
        row.p_holm = p
    return sorted(
        rows,
        key=lambda row: (
            row.interpolated["steps"].mean if row.interpolated["steps"] else math.inf,
            row.final.mean,
        ),
    )


def _costs(group: Group, target: float | None) -> Row:
    crossings = {
        unit: [
            None if target is None else statistics.crossing(getattr(run, unit), run.losses, target)
            for run in group.runs
        ]
        for unit in UNITS
    }

    def mean(unit: str, kind: str) -> Estimate | None:
        found = [getattr(crossing, kind) for crossing in crossings[unit] if crossing is not None]
        return statistics.estimate(found) if len(found) == len(group.runs) else None

    return Row(
        group,
        statistics.estimate(group.finals),
        crossings,
        {unit: mean(unit, "interpolated") for unit in UNITS},
        {unit: mean(unit, "first") for unit in UNITS},
        dict.fromkeys(UNITS),
    )


def _against(row: Row, reference: Row, sigma: float | None, loss_per_step: float) -> None:
    devices = row.group.devices | reference.group.devices
    row.same_device = len(devices) == 1
    for unit in UNITS:
        if row.interpolated[unit] and reference.interpolated[unit] and (unit != "seconds" or row.same_device):
            row.speedup[unit] = statistics.speedup(
                [crossing.interpolated for crossing in reference.crossings[unit]],
                [crossing.interpolated for crossing in row.crossings[unit]],
            )
    saved = reference.group.planned_steps - row.group.planned_steps
    if saved == 0:
        # Final losses after schedules of different lengths answer no question: the longer run has simply trained more.
        row.p_baseline = statistics.differ(row.group.finals, reference.group.finals)
    if sigma and (saved == 0 or loss_per_step):
        row.z_baseline = statistics.z_better(
            row.group.finals, reference.group.finals, sigma, saved, loss_per_step
        )


def to_csv(comparison: Comparison, rows: list[Row]) -> str:
    """Unrounded (10 digits) figures, one line per group; what does not exist is an empty cell."""
    lines = []
    for row in rows:
        line = {
            "optimizer": row.group.label,
            "n": len(row.group.runs),
            "set_aside": row.group.aside,
            "planned_steps": row.group.planned_steps,
            "final_loss": row.final.mean,
            "final_loss_se": row.final.error,
            "target": comparison.target,
            "reached": row.reached,
        }
        for unit in UNITS[1:] + UNITS[:1]:
            for kind in ("interpolated", "first"):
                cost = getattr(row, kind)[unit]
                line[f"{unit}_{kind}"] = cost and cost.mean
                line[f"{unit}_{kind}_se"] = cost and cost.error
        line["baseline"] = comparison.baseline and comparison.baseline.label
        for unit in ("steps", "seconds"):
            ratio = row.speedup[unit]
            for part in ("value", "low", "high"):
                line[f"speedup_{unit}" + ("" if part == "value" else f"_{part}")] = ratio and getattr(
                    ratio, part
                )
        for key in ("p_target", "z_target", "p_baseline", "p_holm", "z_baseline"):
            line[key] = getattr(row, key)
        lines.append(
            {key: f"{value:.10g}" if isinstance(value, float) else value for key, value in line.items()}
        )
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else ["optimizer"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def cells(comparison: Comparison, rows: list[Row]) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Headings, and per row and column the cell's main text and its second line (both may be empty)."""
    headings = ["optimizer", "n", "final loss"]
    if comparison.target is not None:
        headings += [f"{unit} to {comparison.target:g}" for unit in ("steps", "seconds", "tokens")]
    if comparison.baseline is not None and comparison.target is not None:
        headings += ["speed-up in steps", "speed-up in seconds"]
    with_sigma = any(row.z_target is not None or row.z_baseline is not None for row in rows)
    headings += [f"p (loss < {comparison.target:g})"] * (comparison.target is not None)
    headings += [f"p (loss ≠ {comparison.baseline.label})"] * (comparison.baseline is not None)
    headings += ["z (known σ)"] * with_sigma
    return headings, [_cells(comparison, row, with_sigma) for row in rows]


def _cells(comparison: Comparison, row: Row, with_sigma: bool) -> list[tuple[str, str]]:
    aside = f"{row.group.aside} set aside" if row.group.aside else ""
    is_baseline = row.group is comparison.baseline
    result = [
        (row.group.label, "baseline" if is_baseline else ""),
        (str(len(row.group.runs)), aside),
        (amount(row.final, "loss"), ""),
    ]
    if comparison.target is not None:
        for unit in ("steps", "seconds", "tokens"):
            cost, first = row.interpolated[unit], row.first[unit]
            reached = f"{row.reached} of {len(row.group.runs)} reached it" if unit == "steps" else ""
            result.append(
                (amount(cost, unit), f"evaluated: {amount(first, unit, False)}") if cost else ("–", reached)
            )
        if comparison.baseline is not None:
            result += [("1", "") if is_baseline else _ratio(row, unit) for unit in ("steps", "seconds")]
        result.append((pvalue(row.p_target), ""))
    if comparison.baseline is not None:
        holm = (
            f"Holm: {pvalue(row.p_holm)}" if row.p_holm is not None and row.p_holm != row.p_baseline else ""
        )
        result.append((pvalue(row.p_baseline), holm))
    if with_sigma:
        result.append((_z(row.z_target, "target"), _z(row.z_baseline, "baseline")))
    return result


def _ratio(row: Row, unit: str) -> tuple[str, str]:
    ratio = row.speedup[unit]
    if ratio is None:
        return "–", "" if row.same_device or unit == "steps" else "other device"
    return f"{ratio.value:.2f}×", interval(ratio) if ratio.low is not None else "no interval"


def _z(z: float | None, against: str) -> str:
    return "" if z is None else f"{against}: {z:.2f}"


def interval(ratio: Ratio) -> str:
    return f"{ratio.low:.2f} to {ratio.high:.2f}"


def pvalue(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}" if p < 0.01 else f"{p:.2f}"


def amount(value: Estimate | None, unit: str, with_error: bool = True) -> str:
    """`mean ± standard error` in the digits that suit the unit; the bare mean for a single seed or without `with_error`."""
    if value is None:
        return "–"
    scale, suffix, digits = 1.0, "", 4
    if unit == "tokens":
        scale, suffix = next(
            ((s, c) for s, c in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if value.mean >= s), (1.0, "")
        )
    if unit != "loss":
        size = value.mean / scale
        digits = 0 if size >= 1000 else 1 if unit == "steps" or size >= 100 else 2
    mean = f"{value.mean / scale:,.{digits}f}"
    return (
        f"{mean}{suffix}"
        if value.error is None or not with_error
        else f"{mean} ± {value.error / scale:,.{digits}f}{suffix}"
    )
