"""loss_vs_time.png: the losses of one run against its training time."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TRAIN, VAL = "#56B4E9", "#D55E00"  # Okabe and Ito's palette: told apart by colour-blind readers


def loss_vs_time(lines: Iterable[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw ``train/loss`` and ``val/loss`` [nats per token] of a record's lines against ``train_time_s``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, for no process but the one that draws needs it
    from matplotlib.figure import Figure

    lines = list(lines)

    def curve(key: str) -> tuple[list[float], list[float]]:
        points = [(line["train_time_s"], line[key]) for line in lines if line.get(key) is not None]
        return [x for x, _ in points], [y for _, y in points]

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*curve("train/loss"), color=TRAIN, linewidth=0.8, alpha=0.8, label="training")
    times, losses = curve("val/loss")
    label = f"validation, {losses[-1]:.4f} at the end" if losses else "validation"
    axes.plot(times, losses, color=VAL, linewidth=1.8, marker="o", markersize=3.5, label=label)
    axes.set(xlabel="training time (s)", ylabel="loss (nats per token)", title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
