"""The table of a comparison: one row per group, as numbers, as CSV, and as cells for Markdown and the page."""

import csv
import io
import math
from dataclasses import dataclass, field

from trainer.metrics.summary import Crossing, crossing

from . import paired, statistics
from .groups import UNITS, Comparison, Group
from .statistics import Estimate, Ratio

GAIN = 0.05  # of the steps: the smallest gain worth finding


@dataclass
class Row:
    """What is known of one group, by unit (seconds, steps, tokens) where it is a cost.

    Unless every seed reached the target, the costs to it are None: leaving out the seeds that failed would flatter
    the group. Seconds are compared only between runs on the same device.
    """

    group: Group
    final: Estimate
    crossings: dict[str, list[Crossing | None]]
    interpolated: dict[str, Estimate | None]
    first: dict[str, Estimate | None]
    speedup: dict[str, Ratio | None] = field(default_factory=lambda: dict.fromkeys(UNITS))
    same_device: bool = True
    p_target: float | None = None
    z_target: float | None = None
    first_below: statistics.Reached | None = None
    p_baseline: float | None = None
    p_holm: float | None = None
    z_baseline: float | None = None
    pairs: paired.Pairs | None = None
    p_pairs_holm: float | None = None

    @property
    def label(self) -> str:
        return self.group.label

    @property
    def reached(self) -> int:
        return sum(found is not None for found in self.crossings["steps"])


def build(
    comparison: Comparison, sigma: float | None = None, loss_per_step: float = 0, gain: float = GAIN
) -> list[Row]:
    """Rows, fastest to the target first. `sigma` adds the known-σ tests, `loss_per_step` their price of a step; `gain`
    is the share of the steps whose loss is worth finding."""
    rows = [_costs(group, comparison.target) for group in comparison.groups]
    reference = next((row for row in rows if row.group is comparison.baseline), None)
    others = [row for row in rows if row is not reference]
    if comparison.target is not None:
        for row in rows:
            finals = row.group.finals
            row.p_target = statistics.below_target(finals, comparison.target)
            if sigma:
                row.z_target = statistics.z_below_target(finals, comparison.target, sigma)
                row.first_below = _first_below(row.group, comparison.target, sigma)
    if reference is not None:
        for row in others:
            _against(row, reference, sigma, loss_per_step)
        for row, p in zip(others, statistics.holm([row.p_baseline for row in others]), strict=True):
            row.p_holm = p
        for row in others:
            row.pairs = paired.compare(row.group, reference.group, gain, len(others), loss_per_step)
        tests = [row.pairs and row.pairs.loss.p for row in others]
        for row, p in zip(others, statistics.holm(tests), strict=True):
            row.p_pairs_holm = p
    return sorted(rows, key=_speed)


def _first_below(group: Group, target: float, sigma: float) -> statistics.Reached | None:
    """None also where runs are set aside: whoever leaves some out, or stops them one by one, chooses the outcome."""
    if group.aside:
        return None
    curve = group.curve()
    return statistics.first_below_target(curve["steps"], curve["mean"], len(group.runs), target, sigma)


def _speed(row: Row) -> tuple[float, float]:
    cost = row.interpolated["steps"]
    return (cost.mean if cost else math.inf), row.final.mean


def _costs(group: Group, target: float | None) -> Row:
    crossings, means = {}, {"interpolated": {}, "first": {}}
    for unit in UNITS:
        crossings[unit] = [
            None if target is None else crossing(getattr(run, unit), run.losses, target) for run in group.runs
        ]
        all_reached = None not in crossings[unit]
        for kind, estimates in means.items():
            values = [getattr(found, kind) for found in crossings[unit]] if all_reached else []
            estimates[unit] = statistics.estimate(values)
    return Row(group, statistics.estimate(group.finals), crossings, **means)


def _against(row: Row, reference: Row, sigma: float | None, loss_per_step: float) -> None:
    row.same_device = len(row.group.devices | reference.group.devices) == 1
    for unit in UNITS:
        if row.interpolated[unit] and reference.interpolated[unit] and (unit != "seconds" or row.same_device):
            costs = ([found.interpolated for found in side.crossings[unit]] for side in (reference, row))
            row.speedup[unit] = statistics.speedup(*costs)
    saved = reference.group.planned_steps - row.group.planned_steps
    if saved == 0:
        # After schedules of different lengths, final losses answer no question: the longer run has trained more.
        row.p_baseline = statistics.differ(row.group.finals, reference.group.finals)
    if sigma and (saved == 0 or loss_per_step):
        finals = row.group.finals, reference.group.finals
        row.z_baseline = statistics.z_better(*finals, sigma, saved, loss_per_step)


def to_csv(comparison: Comparison, rows: list[Row]) -> str:
    """Unrounded (10 digits) figures, one line per group; what does not exist is an empty cell."""
    lines = [_figures(comparison, row) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else ["optimizer"], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: f"{v:.10g}" if isinstance(v, float) else _no_formula(v) for k, v in line.items()})
    return out.getvalue()


def _no_formula(value: object) -> object:
    """A text that a spreadsheet would compute is told to be one, by the apostrophe that spreadsheets know."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _figures(comparison: Comparison, row: Row) -> dict[str, object]:
    line = {
        "optimizer": row.label,
        "n": row.final.n,
        "set_aside": row.group.aside,
        "planned_steps": row.group.planned_steps,
        "final_loss": row.final.mean,
        "final_loss_se": row.final.error,
        "target": comparison.target,
        "reached": row.reached,
    }
    for unit in ("steps", "seconds", "tokens"):
        for kind in ("interpolated", "first"):
            cost = getattr(row, kind)[unit]
            line[f"{unit}_{kind}"], line[f"{unit}_{kind}_se"] = cost and cost.mean, cost and cost.error
    line["baseline"] = comparison.baseline and comparison.baseline.label
    for unit in ("steps", "seconds"):
        ratio = row.speedup[unit]
        line[f"speedup_{unit}"] = ratio and ratio.value
        line[f"speedup_{unit}_low"], line[f"speedup_{unit}_high"] = ratio and ratio.low, ratio and ratio.high
    for key in ("p_target", "z_target", "p_baseline", "p_holm", "z_baseline"):
        line[key] = getattr(row, key)
    return line | _pairs(row.pairs) | {"p_pairs_holm": row.p_pairs_holm}


def _pairs(pairs: paired.Pairs | None) -> dict[str, object]:
    line: dict[str, object] = {"pairs": pairs and pairs.n}
    for name in ("loss", "steps"):
        found = pairs and getattr(pairs, name)
        for key, value in (("", "mean"), ("_low", "low"), ("_high", "high")):
            line[f"pairs_{name}{key}"] = found and getattr(found, value)
    return line | {"pairs_seeds_needed": pairs and pairs.seeds, "p_pairs": pairs and pairs.loss.p}


Cell = tuple[str, str]  # main text and a second line, which may be empty


def cells(comparison: Comparison, rows: list[Row]) -> tuple[list[str], list[list[Cell]]]:
    """Headings, and the cells of every row."""
    target, baseline = comparison.target, comparison.baseline
    with_sigma = any(row.z_target is not None or row.z_baseline is not None for row in rows)
    headings = ["optimizer", "n", "final loss"]
    if target is not None:
        headings += [f"{unit} to {target:g}" for unit in ("steps", "seconds", "tokens")]
        headings += ["speed-up in steps", "speed-up in seconds"] if baseline else []
        headings.append(f"p (loss < {target:g})")
    headings += [f"p (loss ≠ {baseline.label})"] if baseline else []
    with_pairs = any(row.pairs for row in rows)
    headings += ["Δ loss at the same seeds", "worth in steps"] if with_pairs else []
    headings += ["z (known σ)"] if with_sigma else []
    return headings, [_cells(comparison, row, with_pairs, with_sigma) for row in rows]


def _cells(comparison: Comparison, row: Row, with_pairs: bool, with_sigma: bool) -> list[Cell]:
    is_baseline = row.group is comparison.baseline
    aside = f"{row.group.aside} set aside" if row.group.aside else ""
    line = [(row.label, "baseline" if is_baseline else ""), (str(row.final.n), aside)]
    line.append((amount(row.final, "loss"), ""))
    if comparison.target is not None:
        line += [_cost(row, unit) for unit in ("steps", "seconds", "tokens")]
        if comparison.baseline:
            line += [("1", "") if is_baseline else _ratio(row, unit) for unit in ("steps", "seconds")]
        line.append((pvalue(row.p_target), ""))
    if comparison.baseline:
        adjusted = row.p_holm is not None and row.p_holm != row.p_baseline
        line.append((pvalue(row.p_baseline), f"Holm: {pvalue(row.p_holm)}" if adjusted else ""))
    if with_pairs:
        line += [_difference(row.pairs and row.pairs.loss, 4), _difference(row.pairs and row.pairs.steps, 0)]
    if with_sigma:
        line.append(tuple("" if z is None else f"{name}: {z:.2f}" for name, z in
                          (("target", row.z_target), ("baseline", row.z_baseline))))  # fmt: skip
    return line


def _cost(row: Row, unit: str) -> Cell:
    if row.interpolated[unit] is None:
        return "–", f"{row.reached} of {row.final.n} reached it" if unit == "steps" else ""
    return amount(row.interpolated[unit], unit), f"evaluated: {amount(row.first[unit], unit, False)}"


def _ratio(row: Row, unit: str) -> Cell:
    ratio = row.speedup[unit]
    if ratio is None:
        return "–", "other device" if unit == "seconds" and not row.same_device else ""
    return f"{ratio.value:.2f}×", "no interval" if ratio.low is None else interval(ratio)


def _difference(found: paired.Difference | None, digits: int) -> Cell:
    if found is None:
        return "–", ""
    return signed(found.mean, digits), "no interval" if found.low is None else span(found.low, found.high, digits)


def signed(value: float, digits: int) -> str:
    """With a sign, and a true minus; what rounds to zero has none."""
    return "0" if float(text := f"{value:+,.{digits}f}".replace(",", "")) == 0 else text.replace("-", "−")


def span(low: float, high: float, digits: int) -> str:
    return f"{signed(low, digits)} to {signed(high, digits)}"


def interval(ratio: Ratio) -> str:
    return f"{ratio.low:.2f} to {ratio.high:.2f}"


def pvalue(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}" if p < 0.01 else f"{p:.2f}"


def amount(value: Estimate, unit: str, with_error: bool = True) -> str:
    """`mean ± standard error` in digits that suit the unit; the bare mean for one seed or without `with_error`."""
    scale, suffix, digits = 1.0, "", 4
    if unit == "tokens":
        scales = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
        scale, suffix = next(((s, letter) for s, letter in scales if value.mean >= s), (1.0, ""))
    size = value.mean / scale
    if unit != "loss":
        digits = 0 if size >= 1000 else 1 if unit == "steps" or size >= 100 else 2
    if value.error is None or not with_error:
        digits = 0 if unit == "steps" and size == int(size) else digits
        return f"{size:,.{digits}f}{suffix}"
    return f"{size:,.{digits}f} ± {value.error / scale:,.{digits}f}{suffix}"
