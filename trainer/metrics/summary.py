"""What a run comes to: its last loss, and where it reached a target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

AXES = {"steps": "step", "tokens": "tokens", "seconds": "train_time_s"}  # name in the summary -> key of a line


@dataclass(frozen=True)
class Crossing:
    """Where a run reached the target: interpolated between evaluations, and at the first one at or below it."""

    interpolated: float
    first: float


def crossing(position: Sequence[float], losses: Sequence[float], target: float) -> Crossing | None:
    """First crossing of ``target``, in the unit of ``position``; None if no evaluation reached it.

    Linear between the last evaluation above the target and the first at or below it.  A run that is below it at its
    first evaluation crossed somewhere before: that evaluation stands for both.
    """
    for i, loss in enumerate(losses):
        if loss <= target:
            first = float(position[i])
            if i == 0:
                return Crossing(first, first)
            part = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return Crossing(position[i - 1] + part * (position[i] - position[i - 1]), first)
    return None


def summary(lines: Sequence[Mapping[str, Any]], target: float | None) -> dict[str, float]:
    """Of the lines of a record.

    Returns:
        final/val_loss, final/steps, final/tokens, final/seconds; and if ``target`` was reached, target/<axis>
        (interpolated) and target/evaluated_<axis> (at the first evaluation at or below it).
    """
    needed = (*AXES.values(), "val/loss")
    evaluated = [line for line in lines if all(line.get(key) is not None for key in needed)]
    if not evaluated:
        return {}
    last, losses = evaluated[-1], [line["val/loss"] for line in evaluated]
    found = {"final/val_loss": last["val/loss"]} | {f"final/{name}": last[key] for name, key in AXES.items()}
    for name, key in AXES.items():
        if target is not None and (reached := crossing([line[key] for line in evaluated], losses, target)):
            found |= {f"target/{name}": reached.interpolated, f"target/evaluated_{name}": reached.first}
            found["target/loss"] = target
    return found
