"""Turn an experiment's knobs, its constants, and see which of its checks still hold.

    python scripts/lecture/what_if.py noise_ball                       its checks, in the short form that the tests run
    python scripts/lecture/what_if.py noise_ball RATES=0.4,0.1         with other steps
    python scripts/lecture/what_if.py noise_ball --figure seen.png     and its figure
    python scripts/lecture/what_if.py noise_ball --full                as long as for the page

A value is written as in Python; words need no quotes. Nothing in docs/lecture is changed.
"""

import argparse
import ast
import base64
import html
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common import UserError  # noqa: E402
from scripts.lecture import style  # noqa: E402
from scripts.lecture.experiment import TOPIC_OF, Check, load  # noqa: E402

FIXED = {"TITLE", "METHODS", "SIZE", *vars(style)}  # what a module has in capitals besides its knobs


@dataclass(frozen=True)
class Outcome:
    """What was measured, and the figure; a notebook shows both."""

    checks: list[Check]
    picture: bytes

    def __str__(self) -> str:
        return "\n".join(f"{c.what}: {c.measured} ({_verdict(c)})" for c in self.checks)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in (c.what, c.measured, _verdict(c)))}</tr>"
            for c in self.checks
        )
        image = base64.b64encode(self.picture).decode()
        return f'<img src="data:image/png;base64,{image}"><table>{rows}</table>'


def _verdict(check: Check) -> str:
    return check.required if check.holds else f"{check.required}: does not hold"


def what_if(name: str, full: bool = False, **knobs: object) -> Outcome:
    """Measure, check and draw an experiment with these values of its constants, which then have their own again.

    Raises UserError for an experiment or a constant that does not exist, and for a value that it cannot be run with.
    """
    own = constants(name)
    changed = {key: _like(name, key, value, own) for key, value in knobs.items()}
    module = load(name)
    torch.manual_seed(0)
    try:
        vars(module).update(changed)
        measured = module.measure(short=not full)
        return Outcome(module.check(measured), style.picture(module, measured))
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if not changed:
            raise
        shown = " ".join(f"{key}={value}" for key, value in knobs.items())
        raise UserError(f"{shown}: {name} cannot be measured with it: {type(error).__name__}: {error}") from error
    finally:
        vars(module).update(own)


def constants(name: str) -> dict[str, object]:
    """The experiment's knobs. Raises UserError if there is no such experiment."""
    if name not in TOPIC_OF:
        raise UserError(f"experiment {name}: choose one of {', '.join(TOPIC_OF)}")
    return {key: value for key, value in vars(load(name)).items() if key.isupper() and key not in FIXED}


def _like(name: str, key: str, value: object, own: dict[str, object]) -> object:
    """The value as the constant's kind: a tuple where that is one, a float where that is one."""
    if key not in own:
        raise UserError(f"{key}: {name} has {', '.join(own) or 'no constants'}")
    kind = type(own[key])
    if kind is tuple and not isinstance(value, tuple):
        value = (value,)
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind):
        raise UserError(f"{key}={value}: give a {kind.__name__}, such as {own[key]}")
    return value


def _knob(word: str) -> tuple[str, object]:
    key, equals, text = word.partition("=")
    if not equals:
        raise UserError(f"{word}: write a knob as NAME=VALUE")
    try:
        return key, ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return key, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("knobs", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="write the figure there, a PNG")
    parser.add_argument("--full", action="store_true", help="as long as for the page, not in the short form")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as run.py
    try:
        outcome = what_if(options.experiment, options.full, **dict(map(_knob, options.knobs)))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(outcome)
    if options.figure:
        style.write(options.figure, outcome.picture)


if __name__ == "__main__":
    main()
