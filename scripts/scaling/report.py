"""What a transfer study has found: transfer.md, transfer.csv and transfer.png in its folder."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from common import UserError, atomic_write, write_text

from .grid import Axes, Cell, Results, cells
from .optimum import Losses, drift, drift_interval, loss_at, optimum

WORDS = {
    "drift": "the best rate of a width is the vertex of the parabola through the lowest mean loss and its two "
    "neighbours, in log2 of the rate; drift is the slope of a line through them, in powers of 2 a doubling of the "
    "width, with the 95% interval of a bootstrap over seeds (from three on, of which it is optimistic)",
    "cost": "what the widest model loses with the best rate of the narrowest, on the lines between its own mean losses",
    "–": "no optimum inside the grid, or more than one bootstrap sample in twenty without one",
}


@dataclass(frozen=True)
class Row:
    """One optimizer in one parametrisation at one depth and decay; losses [widths, lrs, seeds]."""

    optim: str
    param: str
    depth: int
    decay: float | None
    widths: list[int]
    lrs: list[float]  # log2 of the factors
    seeds: list[int]
    losses: Losses

    @property
    def label(self) -> str:
        decay = "" if self.decay is None else f", decay {self.decay:g}"
        return f"{self.optim}, {self.param}, {self.depth} layer{'s' * (self.depth > 1)}{decay}"

    @property
    def optima(self) -> list[float | None]:
        return [optimum(self.lrs, means) for means in self.losses.mean(-1)]

    @property
    def cost(self) -> float | None:
        """Of the narrowest model's best rate at the widest."""
        first, last = self.optima[0], self.optima[-1]
        if first is None or last is None:
            return None
        means = self.losses[-1].mean(-1)
        return loss_at(self.lrs, means, first) - loss_at(self.lrs, means, last)


def read(axes: Axes, base_width: int, results: Results) -> list[Row]:
    """The rows all of whose runs are there, for the seeds of which that is so."""
    rows, lrs = [], sorted(axes["lr"])
    for optim, param, depth, decay in product(axes["optim"], axes["param"], axes["depths"], axes["decay"]):
        by_seed = {}
        for seed in axes["seeds"]:
            found = [
                results.read(Cell(optim, "standard" if n == base_width else param, depth, decay, n, lr, seed))
                for n, lr in product(axes["widths"], lrs)
            ]
            if all(found):
                by_seed[seed] = [one["loss"] for one in found if one]
        if by_seed:
            losses = np.array(list(by_seed.values())).reshape(len(by_seed), len(axes["widths"]), len(lrs))
            rows.append(Row(optim, param, depth, decay, axes["widths"], [math.log2(lr) for lr in lrs], list(by_seed),
                            np.moveaxis(losses, 0, -1)))  # fmt: skip
    return rows


def write(folder: Path, axes: Axes, base_width: int, overrides: Sequence[str]) -> None:
    """Raises UserError: no row is whole for any seed."""
    results = Results(folder)
    rows = read(axes, base_width, results)
    if not rows:
        mend = "start the same command to go on, or give the widths, lr and seeds that were run"
        raise UserError(f"folder={folder}: no row of this grid is whole: {mend}")
    done = [found for cell in cells(axes, base_width) if (found := results.read(cell))]
    hours = sum(found.get("processor_seconds", math.nan) for found in done) / 3600
    text = to_markdown(rows, overrides) + f"\n{len(done)} runs, {hours:.2f} hours of processor time.\n"
    write_text(folder / "transfer.md", text)
    write_text(folder / "transfer.csv", to_csv(rows))
    with atomic_write(folder / "transfer.png") as file:
        file.write(draw(rows))
    print(text)
    print(f"wrote {folder}/transfer.md, {folder}/transfer.csv, {folder}/transfer.png")


def to_markdown(rows: Sequence[Row], overrides: Sequence[str]) -> str:
    widths = rows[0].widths
    headings = ["run", "seeds", *(f"best rate at {n}" for n in widths), "drift", f"loss at {widths[-1]}", "cost"]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    for row in rows:
        means = row.losses.mean(-1)
        best = [_or_dash(None if x is None else 2**x, "×{:.3g}") for x in row.optima]
        moved, interval = drift(widths, row.optima), drift_interval(widths, row.lrs, row.losses)
        said = _or_dash(moved, "{:+.2f}")
        said += f" ({interval[0]:+.2f} to {interval[1]:+.2f})" if interval and moved is not None else ""
        lowest = np.nanmin(means[-1]) if np.isfinite(means[-1]).any() else None
        ends = [_or_dash(value, "{:.4f}") for value in (lowest, row.cost)]
        lines.append([row.label, str(len(row.seeds)), *best, said, *ends])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(f"- {word}: {meaning}." for word, meaning in WORDS.items())
    return (
        f"# Learning rates over widths\n\n{table}\n\nRates are factors of the preset's (`optim.lr_scale`), with muP at "
        f"the base width {widths[0]}.\n\n{notes}\n\nAll runs: `{' '.join(overrides)}`\n"
    )


def _or_dash(value: float | None, form: str) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return form.format(value).replace("-0.0000", "0.0000")


def to_csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [field.name for field in fields(Row)][:4]
    writer.writerow([*names, "width", "lr_factor", "seed", "loss"])
    for row in rows:
        for (i, n), (j, lr), (k, seed) in product(*map(enumerate, (row.widths, row.lrs, row.seeds))):
            writer.writerow([*astuple(row)[:4], n, f"{2**lr:g}", seed, f"{row.losses[i, j, k]:.6f}"])
    return out.getvalue()


def draw(rows: Sequence[Row]) -> bytes:
    """Loss against learning rate, a panel a row and a curve a width, with its optimum, as PNG bytes."""
    across = len({row.param for row in rows})
    down = -(-len(rows) // across)
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}):
        figure = Figure(figsize=(4.6 * across, 3.1 * down), dpi=130, layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).ravel()
        order = sorted(rows, key=lambda row: (row.optim, row.depth, row.decay or 0, row.param != "standard"))
        for row, panel in zip(order, panels, strict=False):
            for i, n in enumerate(row.widths):
                means = row.losses[i].mean(-1)
                (line,) = panel.plot(row.lrs, means, "o-", ms=3, label=f"width {n}", color=f"C{i}")
                if row.optima[i] is not None:
                    panel.axvline(row.optima[i], color=line.get_color(), lw=0.8, ls=":")
            low, high = np.nanmin(row.losses.mean(-1)), np.nanmax(np.nanmin(row.losses.mean(-1), -1))
            panel.set(title=row.label, xlabel="log2 of the learning rate's factor", ylabel="validation loss",
                      ylim=(low - 0.1 * (high - low) - 0.02, high + 2 * (high - low) + 0.1))  # fmt: skip
        panels[0].legend()
        for panel in panels[len(rows) :]:
            panel.set_axis_off()
        out = io.BytesIO()
        figure.savefig(out, format="png")
    return out.getvalue()
