"""Search spaces, as the optimizers' presets give them under `tune`, beside the settings that they are of.

tune: {lr_scale: around 8, matrix: {momentum: 0.85..0.98, weight_decay: log 0.01..1, update_freq: [5, 10, 20]}}

log 1e-4..1e-1   a number, uniform in its logarithm
0.85..0.98       a number, uniform
around 8         the preset's value times 1/8 to 8, uniform in the logarithm
[5, 10, 20]      one of these
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import hydra
from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from common import UserError
from trainer.config import OptimConfig
from trainer.launch.compose import hydra_initialized, to_hydra

# Of a preset that says nothing: the learning rate of all roles together, and that of the matrices beside the others.
DEFAULT = {"lr_scale": "around 8", "matrix": {"lr": "around 4"}}
FORMS = "write log LOW..HIGH, LOW..HIGH, around FACTOR, or a list"

Space = dict[str, BaseDistribution]


def section(overrides: Sequence[str]) -> dict[str, Any]:
    """What the preset, or the command line, gives under `optim.tune`, which a validated config has no more."""
    words = [to_hydra(override) for override in overrides]
    with hydra_initialized(words):
        return OmegaConf.to_container(hydra.compose("train", overrides=words).optim.tune)


def build(tune: Mapping[str, Any], preset: OptimConfig) -> Space:
    """By key of the command line, such as optim.matrix.lr.

    Args:
        tune: the preset's section; empty stands for ``DEFAULT``.
        preset: the settings themselves, resolved for the model.

    Raises:
        UserError: naming the key, what it says and the forms there are.
    """
    found: Space = {}
    for name, inner in (tune or DEFAULT).items():
        for setting, text in inner.items() if isinstance(inner, Mapping) else [("", inner)]:
            section = getattr(preset, name, None)
            value = section.get(setting) if isinstance(section, Mapping) else section
            key = f"{name}.{setting}" if setting else name
            found[f"optim.{key}"] = parse(f"optim.tune.{key}", text, value)
    return found


def parse(key: str, text: Any, value: Any = None) -> BaseDistribution:
    """The distribution that a text (or list) describes; ``value`` is the preset's, for ``around``."""
    if isinstance(text, Sequence) and not isinstance(text, str) and text:
        return CategoricalDistribution(tuple(text))
    words = str(text).split()
    if len(words) == 2 and words[0] == "around":
        factor = _number(key, text, words[1])
        if not isinstance(value, int | float) or not value > 0 or not factor > 1:
            raise UserError(f"{key}={text}: the preset's value is {value}; it takes one above 0, and a factor above 1")
        return FloatDistribution(value / factor, value * factor, log=True)
    log = len(words) == 2 and words[0] == "log"
    low, dots, high = words[-1].partition("..") if len(words) == 1 + log else ("", "", "")
    if not dots:
        raise UserError(f"{key}={text}: no search space; {FORMS}")
    first, last = _number(key, text, low), _number(key, text, high)
    if not first < last or (log and not first > 0):
        raise UserError(f"{key}={text}: give the lower number first{', above 0' if log else ''}")
    return FloatDistribution(first, last, log=log)


def _number(key: str, text: Any, word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{key}={text}: {word} is not a number; {FORMS}")
    return number
