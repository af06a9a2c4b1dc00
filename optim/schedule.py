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


def power(step: int, steps: int, warmup: int = 0, decay: float = 0, final: float = 0.0, power: float = 1.0) -> float:
    """Linear warm-up, 1, then the last ``decay`` steps' remaining part to the ``power``, never below ``final``
    (modded-nanogpt's PowerCool: min(1, c (steps - step)^power) with c = decay^-power)."""
    left = max(0, steps - step) / decay if decay else 1.0
    fallen: float = min(1.0, left) ** power
    return min(_ramp(step, warmup), max(final, fallen))


def nanogpt(step: int, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """As nanoGPT's train.py has it: a warm-up that does not reach 1, (step + 1) / (warmup + 1), then half a cosine that
    begins at the warm-up's end, to ``final``."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    along = min(1.0, (step - warmup) / (steps - warmup)) if steps > warmup else 1.0
    return final + (1 - final) * (1 + math.cos(math.pi * along)) / 2


SCHEDULES = {
    "constant": constant, "warmdown": warmdown, "cosine": cosine, "wsd": wsd, "power": power, "nanogpt": nanogpt,
}  # fmt: skip


def in_steps(length: float, steps: int) -> int:
    """A length in steps: up to 1 it is a fraction of ``steps``, above 1 it is already a number of steps."""
    return round(length * steps) if length <= 1 else int(length)


def is_length(length: float) -> bool:
    """Whether :func:`in_steps` can read it."""
    return 0 <= length <= 1 or (1 < length < math.inf and length == int(length))


def line(key: str, points: Any, steps: int) -> Schedule:
    """Straight lines between ``points`` [(length, value), …], constant before the first and after the last.

    Of two points at one step, the later holds from there on.
    Raises ValueError: they are no such list, or not in order.
    """
    try:
        pairs = [(float(at), float(value)) for at, value in points]
        lengths, values = [at for at, _ in pairs], [value for _, value in pairs]
        if not pairs or not all(map(math.isfinite, values)):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"{key}={points}: give points [[length, value], …]") from None
    ats = [in_steps(length, steps) for length in lengths if is_length(length)]
    if len(ats) < len(lengths) or ats != sorted(ats):
        raise ValueError(
            f"{key}={points}: give lengths in increasing order, fractions of the run up to 1 or whole numbers of steps"
        )

    def at(step: int) -> float:
        after: int = sum(place <= step for place in ats)
        if after in (0, len(ats)):
            return values[max(0, after - 1)]
        along = (step - ats[after - 1]) / (ats[after] - ats[after - 1])
        return values[after - 1] + along * (values[after] - values[after - 1])

    return at


def build(
    name: str, *, steps: int, warmup: float = 0, decay: float = 0, final: float = 0.0, power: float = 1.0
) -> Schedule:
    """The schedule ``name`` as a function of the step alone.

    Args:
        steps: length of the run.
        warmup, decay: lengths as :func:`in_steps` reads them.  ``decay`` is for ``warmdown``, ``wsd`` and ``power``,
            which does not round it to whole steps.
        final: the multiplier at the end, for all but ``constant``.
        power: exponent of the fall, for ``power``.

    Raises:
        ValueError: an unknown name, or a length or ``final`` out of range.
    """
    if name not in SCHEDULES:
        raise ValueError(f"name={name}: no such schedule; choose one of {', '.join(SCHEDULES)}")
    settings: dict[str, Any] = {"warmup": warmup, "decay": decay, "final": final}
    accepted = inspect.signature(SCHEDULES[name]).parameters
    for key, value in {**settings, "power": power}.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key}={value}: give a number")
    for key, value in settings.items():
        if value and key not in accepted:
            raise ValueError(f"{key}={value}: the schedule {name} has no such setting; leave it 0")
        if key == "final" and not 0 <= value <= 1:
            raise ValueError(f"final={value}: give a multiplier between 0 and 1")
        whole = name != "power" or key != "decay"
        if not 0 <= value < math.inf or (whole and not is_length(value)):
            raise ValueError(f"{key}={value}: give a fraction of the run up to 1, or a whole number of steps")
    if power != 1 and name != "power":
        raise ValueError(f"power={power}: the schedule {name} has no such setting; leave it 1")
    if not 0 < power < math.inf:
        raise ValueError(f"power={power}: give a number above 0")
    settings |= {"warmup": in_steps(warmup, steps), "decay": in_steps(decay, steps), "power": power}
    if name == "power":
        settings["decay"] = decay * steps if decay <= 1 else decay
    if settings["warmup"] + settings["decay"] > steps:
        total = f"warmup of {settings['warmup']} and decay of {settings['decay']} steps"
        raise ValueError(f"{total} do not fit into train.steps={steps}: shorten them")
    return partial(SCHEDULES[name], steps=steps, **{k: v for k, v in settings.items() if k in accepted})


def _ramp(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _decayed(step: int, steps: int, decay: int) -> float:
    """Progress through the last ``decay`` steps, from 0 to 1."""
    return min(1.0, max(0.0, (step - (steps - decay)) / decay)) if decay else 0.0
