"""The comparison as a PNG, drawn by matplotlib: loss against training time and against steps, side by side."""

import io

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend must be chosen first: a server has no display)

from .groups import Comparison  # noqa: E402
from .style import LIGHT, SHAPES, looks  # noqa: E402
from .table import Row  # noqa: E402

INK, MUTED, GRID = LIGHT[0], "#5b6475", "#e6e9ef"
STYLE = {
    "font.size": 10,
    "axes.edgecolor": "#c9cfd9",
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
}


def draw(title: str, subtitle: str, comparison: Comparison, rows: list[Row], published: list[dict]) -> bytes:
    """PNG bytes, 2000 × 900 pixels."""
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, 2, figsize=(12.5, 5.625), dpi=160, sharey=True)
        longest = max((max(run.seconds) for row in rows for run in row.group.runs), default=0)
        clock, unit = (
            (3600, "hours") if longest > 4 * 3600 else (60, "minutes") if longest > 600 else (1, "seconds")
        )
        for panel, key, scale, label in (
            (panels[0], "seconds", clock, f"training time ({unit})"),
            (panels[1], "steps", 1, "steps"),
        ):
            _panel(panel, key, scale, comparison, rows, published if key == "steps" else [])
            panel.set_xlabel(label)
        panels[0].set_ylabel("validation loss")
        handles, labels = panels[1].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="lower center",
            ncols=min(max(len(labels), 1), 6),
            frameon=False,
            labelcolor=INK,
        )
        figure.suptitle(title, x=0.06, y=0.975, ha="left", fontsize=15, fontweight="bold", color=INK)
        figure.text(0.06, 0.905, subtitle, color=MUTED, fontsize=10)
        rows_below = -(-len(labels) // 6)
        figure.subplots_adjust(
            left=0.06, right=0.985, top=0.87, bottom=0.13 + 0.045 * rows_below, wspace=0.06
        )
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
        pyplot.close(figure)
    return out.getvalue()


def _panel(
    panel, key: str, scale: float, comparison: Comparison, rows: list[Row], published: list[dict]
) -> None:
    curves = [row.group.curve() for row in rows]
    for i, entry in enumerate(published):
        line = len(entry["steps"]) > 1
        panel.plot(
            entry["steps"],
            entry["loss"],
            color=MUTED,
            linewidth=1,
            linestyle=("--", "-.", ":")[i % 3] if line else "",
            marker="" if line else "D",
            markerfacecolor="none",
            markersize=4,
            label=f"published: {entry['name']}" if line else None,
        )
    groups = [row.group for row in rows]
    for row, curve, (colour, shape) in zip(rows, curves, looks(groups, comparison.baseline), strict=True):
        x = [value / scale for value in curve[key]]
        if len(row.group.runs) > 1:
            panel.fill_between(x, curve["low"], curve["high"], color=LIGHT[colour], alpha=0.18, linewidth=0)
        panel.plot(
            x,
            curve["loss"],
            color=LIGHT[colour],
            linewidth=1.8,
            marker=SHAPES[shape][1],
            markersize=4.5,
            markevery=max(1, len(x) // 12),
            label=f"{row.group.label} (n = {len(row.group.runs)})",
        )
        if row.interpolated[key]:
            panel.plot(
                [row.interpolated[key].mean / scale],
                [comparison.target],
                marker="o",
                markersize=9,
                markerfacecolor="none",
                markeredgecolor=LIGHT[colour],
                markeredgewidth=1.6,
                linestyle="",
            )
    _limits(panel, key, scale, curves, comparison.target)


def _limits(panel, key: str, scale: float, curves: list[dict], target: float | None) -> None:
    """The part where the curves differ: from where the middle one is after a seventh of its training, with every curve's end."""
    curves = [curve for curve in curves if curve["loss"]]
    if not curves:
        return
    starts = sorted(
        next(
            loss
            for loss, step in zip(curve["loss"], curve["steps"], strict=True)
            if step >= 0.15 * curve["steps"][-1]
        )
        for curve in curves
    )
    top = max(starts[len(starts) // 2], *(curve["loss"][-1] for curve in curves))
    bottom = min([loss for curve in curves for loss in curve["low"]] + ([] if target is None else [target]))
    pad = 0.06 * (top - bottom or 1)
    panel.set_ylim(bottom - pad, top + pad)
    panel.set_xlim(0, 1.03 * max(curve[key][-1] for curve in curves) / scale)
    if target is not None:
        panel.axhline(target, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        panel.annotate(
            f"target {target:g}",
            (0.005, target),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            color=MUTED,
            fontsize=9,
            va="bottom",
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
        )
