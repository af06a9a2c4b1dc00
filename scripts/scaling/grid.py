"""The grid of a transfer study: its cells, what they are trained with, and what is known of them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from common import UserError, write_json

Axes = Mapping[str, list[Any]]


@dataclass(frozen=True)
class Cell:
    """One run. lr: factor of all the preset's learning rates. decay: of the matrices' weights, None the preset's."""

    optim: str
    param: str
    depth: int
    decay: float | None
    width: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        decay = "" if self.decay is None else f",wd={self.decay:g}"
        optim = self.optim.replace("/", "_")
        return f"{optim},{self.param},depth={self.depth}{decay},width={self.width},lr={self.lr:g},seed={self.seed}"

    @property
    def cost_class(self) -> str:
        """Cells that take as long."""
        return f"{self.optim},depth={self.depth},width={self.width}"

    def overrides(self, base_width: int, head_dim: int) -> list[str]:
        words = [f"optim={self.optim}", f"optim.lr_scale={self.lr!r}", f"seed={self.seed}"]
        words += [f"model.n_layer={self.depth}", f"model.n_embd={self.width}", f"model.n_head={self.width // head_dim}"]
        if self.decay is not None:
            words.append(f"optim.matrix.weight_decay={self.decay!r}")
        return words + ([f"model.param={self.param}", f"model.base_width={base_width}"] if self.param == "mup" else [])


def cells(axes: Axes, base_width: int) -> list[Cell]:
    """Seed by seed, so that what there is at any time is a whole grid of fewer seeds; narrow models first.

    At the base width both parametrisations are the same run, which is named standard.
    """
    order = ("seeds", "widths", "depths", "optim", "param", "decay", "lr")
    found = product(*(axes[key] for key in order))
    return list(dict.fromkeys(
        Cell(optim, "standard" if width == base_width else param, depth, decay, width, lr, seed)
        for seed, width, depth, optim, param, decay, lr in found
    ))  # fmt: skip


class Results:
    """What is known of the cells, a file each in ``folder/results``."""

    def __init__(self, folder: Path):
        self.folder = folder / "results"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """loss, NaN where it diverged; lr of the matrices; seconds, and processor_seconds, of the whole run.  None: it
        is not there yet."""
        try:
            found = json.loads((self.folder / f"{cell.name}.json").read_text(encoding="utf-8"))
            return found | {"loss": math.nan if found["loss"] is None else float(found["loss"])}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.folder}/{cell.name}.json is damaged: delete it, and start the same again") from None

    def write(self, cell: Cell, loss: float, lr: float | None, seconds: float, processor_seconds: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = loss if math.isfinite(loss) else None
        cost = {"seconds": seconds, "processor_seconds": processor_seconds}
        write_json(self.folder / f"{cell.name}.json", {"loss": kept, "lr": lr, **cost})
