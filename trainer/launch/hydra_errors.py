"""Hydra's and OmegaConf's exceptions, told in one line: the key, the value and the mend."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common import UserError
from trainer.config import OPEN_SECTIONS, keys
from trainer.language_model import one_line, reason

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)
RENAMED = {"optim.vector": "optim.scalar", "hydra.run.dir": "run.dir", "run.extend": "run.from"}  # to what is meant
QUOTED_KEY = re.compile(r"(?:override|delete|append to config\.?|in) '([\w./@-]+)'")  # in Hydra's own messages
OPEN = tuple(f"{section}." for section in OPEN_SECTIONS)  # whose keys a class decides


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """One line for an exception that composing ``overrides`` over ``configs/`` raised."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    if isinstance(error, MissingConfigException):
        return _missing_choice(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: write KEY=VALUE, with quotes around special characters"
    if isinstance(root, yaml.YAMLError):
        return f"a configuration file is not valid YAML: {one_line(root)}"
    if "HydraConfig was not set" in f"{root}\n{error}":
        given = next((o for o in overrides if "${hydra:" in o), "${hydra:…}")
        return f"{given}: that is for Hydra's own keys: write the value itself"
    found = re.search(r"full_key: (\S+)", f"{root}\n{error}") or QUOTED_KEY.search(str(error))
    if not found:
        interpolated = [o for o in overrides if "${" in o and "interpolation" in str(error)]
        return ": ".join([*interpolated[:1], one_line(error)])
    key = found[1].partition("@")[0]
    typed = (o for o in overrides if f"{o.lstrip('+~').partition('=')[0]}.".startswith(f"{key}."))
    given = next(typed, key).lstrip("+")
    known = set(keys())
    if key not in known and not key.startswith(OPEN):
        return f"{given}: no such key{close_keys(key)}"
    inside = sorted(name for name in known if name.startswith(f"{key}."))
    if inside or f"{key}." in OPEN:
        return f"{given}: {key} is a section, set what is in it: {', '.join(inside) or f'{key}.lr and others'}"
    if "DictConfig with ListConfig" in str(root):
        return f"{given}: the preset gives this list by model.family: set {key}.FAMILY=[…] for your model's family"
    return f"{given}: {reason(root)}"


def check_unknown_keys(composed: DictConfig) -> None:
    """Refuse keys that ``+key=value`` added although the schema has no such key; Hydra would let them pass.

    Raises UserError: naming the key and the nearest ones.
    """
    known = set(keys())

    def walk(value: object, prefix: str) -> None:
        for name, inner in value.items() if isinstance(value, dict) else ():
            key = f"{prefix}{name}"
            if key not in known:
                raise UserError(f"{key}={inner}: no such key{close_keys(key)}")
            if f"{key}." not in OPEN:
                walk(inner, f"{key}.")

    given = OmegaConf.to_container(composed)
    walk(given, "")
    for key in known:
        if "." not in key and isinstance(given, dict) and key not in given:
            raise UserError(f"~{key}: a key cannot be removed; give it another value")


def _missing_choice(error: MissingConfigException) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    options = choices(group)
    if choice.startswith("submitit"):
        return "hydra/launcher needs the package hydra-submitit-launcher: pip install -e '.[slurm]'"
    if not group or not options:
        return one_line(error)
    close = difflib.get_close_matches(choice, options, 1)
    mend = f"did you mean {group}={close[0]}? " if close else ""
    return f"{group}={choice}: no such choice; {mend}available: {', '.join(options)}"


def choices(group: str) -> list[str]:
    """What a group can be; ``rest/`` holds parts of others."""
    found = (path.relative_to(CONFIGS / group).with_suffix("") for path in (CONFIGS / group).rglob("*.yaml"))
    return sorted(path.as_posix() for path in found if path.parts[0] != "rest")


def new_name(key: str) -> str | None:
    """What a key that has another name now is called, or one of Hydra's that stands for ours."""
    for old, new in RENAMED.items():
        if f"{key}.".startswith(f"{old}."):
            return new + key[len(old) :]
    return None


def close_keys(key: str) -> str:
    """A hint at the nearest keys: by their full names, or by their last parts."""
    if new := new_name(key):
        return f"; it is called {new}"
    known = list(keys()) + [path.name for path in CONFIGS.iterdir() if path.is_dir()]
    close = [name for name in difflib.get_close_matches(key, known, 3, 0.7) if not key.startswith(f"{name}.")]
    section, _, leaf = key.rpartition(".")
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    if not close and not same_leaf and section in known:
        siblings = [name.removeprefix(f"{section}.") for name in known if name.rpartition(".")[0] == section]
        return f"; {section} has {', '.join(siblings)}"
    names = list(dict.fromkeys(close[:1] + same_leaf))
    return f"; did you mean {' or '.join(names)}?" if names else "; see python train.py --help"
