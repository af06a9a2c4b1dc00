"""Settings of some parameters of a role alone: ``by_name: {"*.attn.o.weight": {blend: gated}}``."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from .settings import typed

BY_NAME = "by_name"


def typed_by_name(patterns: Any, accepted: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The patterns' settings as the class says.

    Raises:
        ValueError: one line naming ``where``: no such setting, or a value that it cannot have.
    """
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
        ValueError: a pattern that no name matches first.
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
        raise ValueError(f"{BY_NAME}: no parameter of this role is called {unused[0]}: write it as in the model")
    return parted
