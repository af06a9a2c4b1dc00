"""How every figure of the lecture looks."""

import io
from pathlib import Path
from types import ModuleType

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from common import atomic_write
from scripts.speedrun.picture import INK, MUTED, STYLE
from scripts.speedrun.style import LIGHT

COLOURS = LIGHT[1:]
DPI = 110
RC = STYLE | {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlecolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "mathtext.fontset": "dejavusans",
}


def picture(experiment: ModuleType, measured) -> bytes:
    """The experiment's figure as a PNG of at most 256 colours; the same bytes for the same numbers."""
    with rc_context(RC):
        figure = Figure(figsize=experiment.SIZE, dpi=DPI, layout="constrained")
        experiment.draw(measured, figure)
        figure.suptitle(experiment.TITLE, fontsize=12, fontweight="bold", color=INK)
        raw, out = io.BytesIO(), io.BytesIO()
        figure.savefig(raw, format="png")
    Image.open(raw).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(out, "png", optimize=True)
    return out.getvalue()


def guide(axes: Axes, **place) -> None:
    axes.legend(**({"loc": "best"} | place))


def note(axes: Axes, text: str, x: float, y: float, **how) -> None:
    """A remark at a place in fractions of the axes."""
    axes.text(x, y, text, transform=axes.transAxes, color=MUTED, fontsize=8.5, **how)


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(content)
