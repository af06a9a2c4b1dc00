"""Where text comes from: a folder, the hub, the embedded sample, or a class of one's own."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from common import UserError
from data.config import DataConfig
from data.documents import Source
from data.sources.hub import HubText
from data.sources.sample import SampleText


def open_source(config: DataConfig, revision: str | None = None) -> Source:
    """The text that `data.source` names. `revision`: that of a preparation which a hub source continues.

    Raises UserError if there is no such source.
    """
    source = config.source
    if not isinstance(source, str):
        return _instantiate(**source)
    if source == "sample":
        return SampleText()
    if source.startswith("hub:"):
        return HubText(source, config.revision or revision)
    if source in ("", "shards"):
        raise UserError(f"data.source={source!r}: nothing to prepare; name a folder: data=local data.source=FOLDER")
    from data.sources.local import LocalText  # needs pyarrow, which no other source does

    return LocalText(source)


def _instantiate(_target_: str, **settings: Any) -> Source:
    """A source of one's own: the class that `_target_` names, made with the other settings. Raises UserError."""
    key = f"data.source._target_={_target_}"
    module, _, name = _target_.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
        if not isinstance(target, type):  # os.system would be called
            raise TypeError("it is not a class")
        inspect.signature(target).bind(**settings)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}: not found ({error}); write MODULE.CLASS, the module's folder in PYTHONPATH") from None
    except TypeError as error:
        raise UserError(f"{key}: {error}; data.source.SETTING are the arguments of its constructor") from None
    source = target(**settings)
    needed = {"name": str, "revision": str | None, "identity": str | None, "batches": object}
    for member, kind in needed.items():
        if not hasattr(source, member) or not isinstance(getattr(source, member), kind):
            found = repr(getattr(source, member)) if hasattr(source, member) else "missing"
            raise UserError(f"{key}: its {member} is {found}; data/documents.py says what a source has")
    if source.revision is None and source.identity is None:
        raise UserError(f"{key}: its revision and identity are None; give one, a string that changes with the text")
    return source
