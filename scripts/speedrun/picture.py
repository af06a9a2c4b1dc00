"""The comparison as a PNG, drawn by matplotlib: loss against training time and against steps, side by side."""

import io

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .groups import Comparison
from .style import LIGHT, SHAPES, looks
from .table import Row

INK, MUTED = LIGHT[0], "#5b6475"
STYLE = {
    "font.size": 10,
    "axes.edgecolor": "#c9cfd9",
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ef",
    "axes.axisbelow": True,
}


HEIGHT, LINE = 5.625, 0.253  # inches: of the figure, of a line of its legend
LEGEND_ROWS = 8
NAMED = 20  # runs that were set aside, where there are no others


def draw(title: str, subtitle: str, comparison: Comparison, rows: list[Row], published: list[dict]) -> bytes:
    """PNG bytes, 2000 × 900 pixels; higher where the legend has more than LEGEND_ROWS."""
    runs = [run for row in rows for run in row.group.runs] or [run for run, _ in comparison.aside]
    longest = max((max(run.seconds, default=0) for run in runs), default=0)
    clock, unit = (3600, "hours") if longest > 4 * 3600 else (60, "minutes") if longest > 600 else (1, "seconds")
    with rc_context(STYLE):
        figure = Figure(figsize=(12.5, HEIGHT), dpi=160)
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, "seconds", clock, comparison, rows, [])
        _panel(right, "steps", 1, comparison, rows, published)
        left.set(xlabel=f"training time ({unit})", ylabel="validation loss")
        right.set(xlabel="steps")
        handles, labels = right.get_legend_handles_labels()
        labels = [_shortened(label) for label in labels]
        columns = max(1, min(6, len(labels), 160 // (max(map(len, labels), default=0) + 6)))
        lines = -(-len(labels) // columns)
        height = HEIGHT + LINE * max(0, lines - LEGEND_ROWS)
        figure.set_figheight(height)
        figure.legend(handles, labels, loc="lower center", ncols=columns, frameon=False, labelcolor=INK)
        part = HEIGHT / height  # margins are in parts of the height
        figure.suptitle(title, x=0.06, y=1 - 0.025 * part, ha="left", fontsize=15, fontweight="bold", color=INK)
        figure.text(0.06, 1 - 0.095 * part, subtitle, color=MUTED)
        bottom = 0.13 * part + LINE * lines / height
        figure.subplots_adjust(left=0.06, right=0.985, top=1 - 0.13 * part, bottom=bottom, wspace=0.06)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _panel(axes: Axes, unit: str, scale: float, comparison: Comparison, rows: list[Row], published: list[dict]):
    longest = max((max(row.group.curve()[unit], default=0) for row in rows), default=0)
    for i, entry in enumerate(published):
        if entry[unit][0] <= longest:  # the others lie beyond the picture and would fill its legend
            _published(axes, entry, ("--", "-.", ":")[i % 3])
    if not rows:
        for i, (run, _) in enumerate(comparison.aside):
            label = run.name if i < NAMED else f"and {len(comparison.aside) - NAMED} more" if i == NAMED else None
            axes.plot([x / scale for x in getattr(run, unit)], run.losses, ":", linewidth=1.4, label=label)
        return
    look = looks([row.label for row in rows], comparison.baseline and comparison.baseline.label)
    curves = [row.group.curve() for row in rows]
    for row, curve in zip(rows, curves, strict=True):
        colour, shape = LIGHT[look[row.label][0]], SHAPES[look[row.label][1]][1]
        x = [value / scale for value in curve[unit]]
        if row.final.n > 1:
            axes.fill_between(x, curve["low"], curve["high"], color=colour, alpha=0.18, linewidth=0)
        label = f"{row.label} (n = {row.final.n})"
        every = max(1, len(x) // 12)
        axes.plot(x, curve["mean"], color=colour, marker=shape, markersize=4.5, markevery=every, label=label)
        if cost := row.interpolated[unit]:
            ring = {"marker": "o", "markersize": 9, "markeredgewidth": 1.6, "markerfacecolor": "none"}
            axes.plot([cost.mean / scale], [comparison.target], color=colour, linestyle="", **ring)
    _frame(axes, [curve[unit][-1] / scale for curve in curves if curve[unit]], curves, comparison.target)


def _shortened(label: str, most: int = 64) -> str:
    """A label that leaves room for the curves: its ends tell more than its middle."""
    return label if len(label) <= most else f"{label[: most - 25]}…{label[-24:]}"


def _published(axes: Axes, entry: dict, dashes: str) -> None:
    if len(entry["steps"]) > 1:
        label = f"published: {entry['name'].partition(' (')[0]}"
        axes.plot(entry["steps"], entry["loss"], dashes, color=MUTED, linewidth=1, label=label)
    else:
        axes.plot(entry["steps"], entry["loss"], "D", color=MUTED, markersize=4, markerfacecolor="none")


def _frame(axes: Axes, ends: list[float], curves: list[dict], target: float | None) -> None:
    """Show from where the middle curve is after a seventh of its training (as the page does), and every end."""
    losses = [curve["mean"] for curve in curves if curve["mean"]]
    if not losses:
        return
    starts = sorted(
        next(loss for loss, step in zip(curve["mean"], curve["steps"], strict=True) if step >= curve["steps"][-1] / 7)
        for curve in curves
        if curve["mean"]
    )
    top = max(starts[len(starts) // 2], *(loss[-1] for loss in losses))
    bottom = min([min(curve["low"]) for curve in curves if curve["low"]] + ([] if target is None else [target]))
    pad = 0.06 * (top - bottom or 1)
    axes.set(xlim=(0, 1.03 * max(ends)), ylim=(bottom - pad, top + pad))
    if target is not None:
        axes.axhline(target, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
        where = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3), "textcoords": "offset points"}
        axes.annotate(f"target {target:g}", (0.005, target), color=MUTED, fontsize=9, bbox=box, **where)
