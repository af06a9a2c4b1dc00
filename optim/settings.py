"""What a class says of its settings, and values of a config read as it says."""

import inspect
import numbers
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
MENDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a name",
    NoneType: "null",
    torch.dtype: "bfloat16, float16, float32 or float64",
}
UNREAD = object()


def settings_of(cls: type) -> dict[str, Any]:
    """Keyword arguments of a class and their types; ``**kwargs`` stands for those of its bases.

    Where there is no annotation that can be read, the type is the default's (any number where that is an int).
    """
    found: dict[str, Any] = {}
    for base, parameters in _signatures(cls):
        try:
            hints = get_type_hints(base.__init__)  # type: ignore[misc]
        except Exception:  # it names what exists for type checkers only
            hints = {}
        for p in parameters:
            fallback = {bool: bool, int: float, float: float, str: str, tuple: tuple}.get(type(p.default), Any)
            found.setdefault(p.name, hints.get(p.name, fallback))
    return {name: hint for name, hint in found.items() if name not in ("params", "defaults", "process_group")}


def defaults_of(cls: type) -> dict[str, Any]:
    """Keyword arguments of a class that may be left out, and what they are then."""
    found: dict[str, Any] = {}
    for _, parameters in _signatures(cls):
        for p in parameters:
            found.setdefault(p.name, p.default)
    return {name: value for name, value in found.items() if value is not inspect.Parameter.empty}


def _signatures(cls: type) -> Iterator[tuple[type, list[inspect.Parameter]]]:
    """A class, and its bases as far as ``**kwargs`` reach, with the named arguments of each."""
    for base in cls.__mro__:
        parameters = inspect.signature(base).parameters.values()
        yield base, [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return


def typed(value: Any, hint: Any) -> Any:
    """``value`` as the type says, if it can mean that: "no" is False for a bool, 5.0 is 5 for an int, a list becomes a
    tuple. Types that are not in MENDS, and unions with them, take anything.

    Raises:
        ValueError: what to give instead.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = tuple(kind for kind in kinds if kind is not Tensor)  # beside float, which takes a tensor of one number
    for kind in kinds:
        if (read := _read(value, kind)) is not UNREAD:
            return read
    raise ValueError(f"give {' or '.join(_mend(kind) for kind in kinds)}")


def _read(value: Any, kind: Any) -> Any:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind is bool:
        if isinstance(value, bool) or (number and value in (0, 1)):
            return bool(value)
        return WORDS.get(value.lower(), UNREAD) if isinstance(value, str) else UNREAD
    if kind is int:
        return int(value) if number and float(value).is_integer() else UNREAD
    if kind is float:
        if isinstance(value, str):
            return _number(value)
        return value if number or (isinstance(value, Tensor) and value.numel() == 1) else UNREAD
    if kind is str or kind is NoneType:
        return value if isinstance(value, kind) else UNREAD
    if kind is torch.dtype:
        dtype = getattr(torch, value, None) if isinstance(value, str) else value
        return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else UNREAD
    if get_origin(kind) is tuple or kind is tuple:
        return _tuple(value, get_args(kind))
    return tuple(value) if isinstance(value, list) else value


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return UNREAD


def _tuple(value: Any, hints: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple):
        return UNREAD
    if not hints or Ellipsis in hints:
        return tuple(typed(part, hints[0]) if hints else part for part in value)
    if len(value) != len(hints):
        return UNREAD
    return tuple(typed(part, hint) for part, hint in zip(value, hints, strict=True))


def _mend(kind: Any) -> str:
    if get_origin(kind) is tuple and Ellipsis not in get_args(kind):
        return f"{len(get_args(kind))} numbers"
    return MENDS.get(kind, "a list of numbers")
