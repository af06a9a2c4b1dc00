"""Learning-rate schedules: pure functions from a step to a multiplier of the configured learning rate.

``step`` counts updates from 0; the multiplier of step t applies to update t.  Warm-up reaches 1 at its last step;
a decay reaches ``final`` at step = ``steps``, one past the last update, so no update is wasted on lr = final = 0.
Lengths (``warmup``, ``decay``, ``steps``) are in steps.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

Schedule = Callable[[int], float]


def constant(step: int, steps: int, warmup: int = 0) -> float:
    """Linear warm-up, then 1."""
    return _ramp(step, warmup)


def warmdown(step: int, steps: int, warmup: int = 0, decay: int = 0, final: float = 0.0) -> float:
    """Linear warm-up, 1, then a straight line to ``final`` over the last ``decay`` steps (modded-nanogpt's name)."""
    return min(_ramp(step, warmup), final + (1 - final) * (1 - _decayed(step, steps, decay)))


def cosine(step: int, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """Linear warm-up, then half a cosine to ``final`` (Loshchilov and Hutter, arXiv 1608.03983, eq. 5)."""
    along = _decayed(step, steps, steps - warmup)
    return min(_ramp(step, warmup), final + (1 - final) * (1 + math.cos(math.pi * along)) / 2)


def wsd(step: int, steps: int, warmup: int = 0, decay: int = 0, final: float = 0.0) -> float:
    """Warm-up, stable, decay by 1 - sqrt (Hägele et al., arXiv 2405.18392, section 3)."""
    return min(_ramp(step, warmup), final + (1 - final) * (1 - math.sqrt(_decayed(step, steps, decay))))


SCHEDULES = {"constant": constant, "warmdown": warmdown, "cosine": cosine, "wsd": wsd}


def in_steps(length: float, steps: int) -> int:
    """A length in steps: up to 1 it is a fraction of ``steps``, above 1 it is already a number of steps."""
    return round(length * steps) if length <= 1 else int(length)


def build(name: str, *, steps: int, warmup: float = 0, decay: float = 0, final: float = 0.0) -> Schedule:
    """The schedule ``name`` as a function of the step alone.

    Args:
        steps: length of the run.
        warmup, decay: lengths as :func:`in_steps` reads them.  ``decay`` is for ``warmdown`` and ``wsd``.
        final: the multiplier at the end, for all but ``constant``.

    Raises:
        ValueError: an unknown name, or a length or ``final`` out of range.
    """
    if name not in SCHEDULES:
        raise ValueError(f"name={name}: no such schedule; choose one of {', '.join(SCHEDULES)}")
    settings: dict[str, Any] = {"warmup": warmup, "decay": decay, "final": final}
    accepted = inspect.signature(SCHEDULES[name]).parameters
    for key, value in settings.items():
        if value and key not in accepted:
            raise ValueError(f"{key}={value}: the schedule {name} has no such setting; leave it 0")
        if key == "final" and not 0 <= value <= 1:
            raise ValueError(f"final={value}: give a multiplier between 0 and 1")
        if value < 0 or (value > 1 and value != int(value)):
            raise ValueError(f"{key}={value}: give a fraction of the run up to 1, or a whole number of steps")
    settings["warmup"], settings["decay"] = in_steps(warmup, steps), in_steps(decay, steps)
    if settings["warmup"] + settings["decay"] > steps:
        total = f"warmup of {settings['warmup']} and decay of {settings['decay']} steps"
        raise ValueError(f"{total} do not fit into train.steps={steps}: shorten them")
    return partial(SCHEDULES[name], steps=steps, **{k: v for k, v in settings.items() if k in accepted})


def _ramp(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _decayed(step: int, steps: int, decay: int) -> float:
    """Progress through the last ``decay`` steps, from 0 to 1."""
    return min(1.0, max(0.0, (step - (steps - decay)) / decay)) if decay else 0.0
