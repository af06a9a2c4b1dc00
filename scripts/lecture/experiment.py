"""What an experiment is: a module that measures a claim of the lecture, checks it and draws it.

The claim, its derivation and what the figure shows are in the topic's page, docs/lecture/TOPIC.md. A module has
    TITLE       one line, above the figure
    METHODS     names of `optim=` (or torch.optim.…) that it runs or is about
    SIZE        width and height of the figure in inches
    measure(short) -> whatever check and draw need; short is the form that the tests run
    check(measured) -> list[Check]
    draw(measured, figure)
and, where there is an animation, animate(measured, path).
"""

import importlib
import math
from dataclasses import dataclass
from types import ModuleType

from scripts.lecture.topics import TOPICS


@dataclass(frozen=True)
class Check:
    """A measured number and the range in which the claim puts it; without a range it is only reported.

    The page shows as many digits as repeat on another machine: two, unless the number was read from a file.
    """

    what: str
    value: float
    low: float = -math.inf
    high: float = math.inf
    digits: int = 2

    @property
    def holds(self) -> bool:
        return self.low <= self.value <= self.high  # False for NaN

    @property
    def measured(self) -> str:
        return "below 1e-9" if abs(self.value) < 1e-9 else _plain(self.value, self.digits)

    @property
    def required(self) -> str:
        if self.low == -math.inf and self.high == math.inf:
            return "–"  # only reported
        if self.low == -math.inf:
            return f"at most {_plain(self.high)}"
        if self.high == math.inf:
            return f"at least {_plain(self.low)}"
        return f"{_plain(self.low)} to {_plain(self.high)}"

    def __str__(self) -> str:
        return f"{self.what}: {self.value:.6g}, but the claim says {self.required}"


def _plain(value: float, digits: int = 3) -> str:
    """So many digits, whole hundreds and thousands written out."""
    value = float(f"{value:.{digits}g}")
    if 100 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


TOPIC_OF = {name: topic for topic, names in TOPICS.items() for name in names}


def load(name: str) -> ModuleType:
    return importlib.import_module(f"scripts.lecture.{TOPIC_OF[name]}.{name}")


def source_of(name: str) -> str:
    return f"scripts/lecture/{TOPIC_OF[name]}/{name}.py"


def test_of(name: str) -> str:
    return f"tests/lecture/test_claims.py::test_claim[{name}]"
