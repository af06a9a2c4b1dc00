"""After, or in, which updates something happens."""

import re
from typing import Any

from common import UserError


def is_time(every: int | None, step: int, last: int) -> bool:
    """Whether what happens every so many updates, and after the last, happens after update ``step``."""
    return every is not None and (step % every == 0 or step == last)


def eval_is_due(config: Any, step: int) -> bool:
    """Whether the weights after ``step`` updates of a run with this Config are evaluated."""
    steps, late = config.train.steps, config.eval.late_every
    every = late if late and step / config.schedule.end(steps) >= 0.9 else config.eval.every
    return step % every == 0 or step == steps


def profiled(updates: str | None, steps: int) -> range:
    """The updates that ``train.profile`` names, of a run of so many.  Raises UserError."""
    if updates is None:
        return range(0)
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", updates)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last <= steps:
        raise UserError(f"train.profile={updates}: give one update or a span of them within 1-{steps}, such as 10-13")
    return range(first, last + 1)
