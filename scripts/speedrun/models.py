"""Whether records are of one model, also where they were written by versions of its class with fewer settings.

A header has ``model_settings``, those that differ from the class's defaults, and ``model_defaults``, the others; older
ones have only ``model_hash``, of both together. A setting that one record does not know was not there when it was
written: what the model then was is the default of today.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import Any

from trainer.metrics.identity import model_hash

Header = Mapping[str, Any]
NEWER = 3  # settings that a class may have more than when a hash was made


def same_model(a: Header, b: Header) -> bool:
    if _settings(a) and _settings(b):
        return not differences(a, b)
    told, other = (a, b) if _settings(a) else (b, a)
    hashes = _earlier_hashes(told) if _settings(told) else {told.get("model_hash")}
    return other.get("model_hash") in hashes


def differences(a: Header, b: Header) -> dict[str, tuple[Any, Any]]:
    """``model.KEY`` -> both values, of the settings in which two models differ whose headers have them."""
    mine, theirs = _settings(a), _settings(b)
    newer = {key for own, other in ((a, theirs), (b, mine)) for key in own["model_defaults"] if key not in other}
    pairs = {key: (mine.get(key), theirs.get(key)) for key in {**mine, **theirs} if key not in newer}
    return {f"model.{key}": pair for key, pair in pairs.items() if _text(pair[0]) != _text(pair[1])}


def unify(headers: Iterable[dict[str, Any]]) -> dict[str, Header]:
    """Give headers of one model one ``model_hash``; returns, by that, a header that has the model's settings."""
    found: dict[str, Header] = {}
    told, hashed = [], []
    for header in headers:
        (told if _settings(header) else hashed).append(header)
    for header in told:
        same = (name for name, other in found.items() if not differences(header, other))
        header["model_hash"] = next(same, model_hash(_settings(header)))
        found.setdefault(header["model_hash"], header)
    earlier = {hash_: name for name, header in found.items() for hash_ in _earlier_hashes(header)}
    for header in hashed:
        if isinstance(own := header.get("model_hash"), str):
            header["model_hash"] = earlier.get(own, own)
    return found


def alike(models: Mapping[str, Header], across: Sequence[str]) -> dict[str, str]:
    """``model_hash`` -> that of the first model from which it differs in nothing but the settings ``across``."""
    found: dict[str, str] = {}
    for name, header in models.items():
        firsts = dict.fromkeys(found.values())
        same = (one for one in firsts if not set(differences(header, models[one])) - set(across))
        found[name] = next(same, name)
    return found


def value(header: Header, setting: str) -> Any:
    """Of ``model.KEY``; None where the header does not know it."""
    return _settings(header).get(setting.removeprefix("model."))


def _settings(header: Header) -> dict[str, Any]:
    parts = [header.get("model_settings"), header.get("model_defaults")]
    return {**parts[1], **parts[0]} if all(isinstance(part, dict) for part in parts) else {}


def _earlier_hashes(header: Header) -> set[str]:
    """Of the same model by classes that had up to NEWER settings less."""
    settings, usual = _settings(header), header["model_defaults"]
    numbers = [n for n in range(NEWER + 1) if comb(len(usual), n) <= 50_000]
    fewer = (set(keys) for n in numbers for keys in combinations(usual, n))
    return {model_hash({k: v for k, v in settings.items() if k not in keys}) for keys in fewer}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
