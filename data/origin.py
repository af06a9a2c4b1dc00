"""Whether a prepared folder holds the text that a run asks for, as far as can be told without the network."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import UserError
from data.config import DataConfig
from data.documents import Source
from data.sources import open_source


def check_origin(config: DataConfig, content: dict[str, Any]) -> None:
    """Compare what `config` names with a folder's manifest. Raises UserError if the folder holds something else.

    A source that is not at hand, as where only the shards were copied, is compared by its name alone.
    """
    for key, asked, found in _differences(config, content):
        here = f"data=shards data.dir={config.folder} data.order={config.order} trains on what is there"
        mend = f"prepare it into another data.dir, or {here}"
        raise UserError(f"data.{key}={asked}: {config.folder} was prepared {found}; {mend}")


def _differences(config: DataConfig, content: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    before, settings = content["source"], content["settings"]
    for key in ("tokens", "val_tokens"):  # of fetched shards, more than asked for is enough
        asked = getattr(config, key)
        if "pretokenized" not in settings and asked is not None and asked != settings.get(key, asked):
            yield key, asked, f"with {settings[key]}"
    validation = settings.get("validation", "first")
    if config.source != "shards" and "val_tokens" in settings and validation != config.validation:
        yield "validation", config.validation, f"with {validation}"
    if str(config.source).startswith("hub:"):
        if before not in (config.source, f"hub:{config.pretokenized}"):
            yield "source", config.source, f"from {before}"
        if re.fullmatch("[0-9a-f]{40}", config.revision or "") and config.revision != content["revision"]:
            yield "revision", config.revision, f"from commit {content['revision']}"
    elif config.source not in ("", "shards"):
        source, local = _at_hand(config), isinstance(config.source, str) and config.source != "sample"
        name, then = before, settings.get("content")
        if source:
            name = source.name
        elif local:
            name = Path(os.path.realpath(Path(config.source).expanduser())).name
        if name != before:
            yield "source", config.source, f"from {before}"
        elif source and then and (":" in then or not local) and then != source.identity:  # none of local text before
            yield "source", config.source, f"from other text called {before}, or before a change"


def _at_hand(config: DataConfig) -> Source | None:
    with suppress(Exception):  # training needs no source, so whatever keeps one from being opened is no error
        return open_source(config)
    return None
