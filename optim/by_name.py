"""Settings of some parameters of a role alone: ``by_name: {"*.attn.o.weight": {blend: gated}}``."""

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from .settings import typed

BY_NAME = "by_name"


def typed_by_name(patterns: Any, accepted: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The patterns' settings as the class says; of None, which takes another preset's away, nothing.

    Raises:
        ValueError: one line naming ``where``: no such setting, or a value that it cannot have.
    """
    if patterns is None:
        return {}
    if not isinstance(patterns, Mapping) or not all(isinstance(own, Mapping) for own in patterns.values()):
        raise ValueError(f"{where}.{BY_NAME}={patterns}: give {{name pattern: {{setting: value}}}}")
    found: dict[str, dict[str, Any]] = {}
    for pattern, own in patterns.items():
        found[pattern] = {}
        for key, value in own.items():
            if key not in accepted:
                raise ValueError(f"{where}.{BY_NAME}: {pattern}: no setting {key}; there are {', '.join(accepted)}")
            try:
                found[pattern][key] = typed(value, accepted[key])
            except ValueError as error:
                raise ValueError(f"{where}.{BY_NAME}: {pattern}: {key}={value}: {error}") from None
    return found


def split_by_name(groups: list[Any], patterns: Mapping[str, dict[str, Any]]) -> list[Any]:
    """Groups of (name, parameter) pairs, parted by the first pattern that a name matches.

    Raises:
        ValueError: a pattern that no name matches first, with names that are near it.
    """
    used: set[str | None] = set()
    parted = []
    for group in groups:
        members: dict[str | None, list[Any]] = {}
        for name, parameter in group["params"]:
            pattern = next((p for p in patterns if fnmatchcase(name, p)), None)
            members.setdefault(pattern, []).append((name, parameter))
        used |= members.keys()
        parted += [{**group, **(patterns[p] if p else {}), "params": named} for p, named in members.items()]
    if unused := [pattern for pattern in patterns if pattern not in used]:
        names = [name for group in groups for name, _ in group["params"]]
        raise ValueError(f"{BY_NAME}: {unused[0]}: {_mend(unused[0], names)}")
    return parted


def _mend(pattern: str, names: list[str]) -> str:
    if any(fnmatchcase(name, pattern) for name in names):
        return "patterns before it take all that it matches: write it before them"
    by_end: dict[str, str] = {}  # such as o.weight: what stands before is a number or a star
    for name in names:
        by_end.setdefault(".".join(name.split(".")[-2:]), name)
    close = difflib.get_close_matches(".".join(pattern.split(".")[-2:]), by_end, 3, 0.5)
    near = [by_end[end] for end in close] or names[:3]
    return f"no parameter of this role is called so; there are {', '.join(near)}"
