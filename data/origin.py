"""Whether a prepared folder holds the text that a run asks for, as far as can be told without the network."""

from __future__ import annotations

import re
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
    before, settings = content["source"], content["settings"]
    for key in ("tokens", "val_tokens"):
        wanted = getattr(config, key)
        if wanted is not None and key in settings and "pretokenized" not in settings and wanted != settings[key]:
            raise _other(config, f"data.{key}={wanted}", f"with {settings[key]}")
    if config.source in ("", "shards"):
        return
    if isinstance(config.source, str) and config.source.startswith("hub:"):
        if before not in (config.source, f"hub:{config.pretokenized}"):
            raise _other(config, f"data.source={config.source}", f"from {before}")
        commit = config.revision if re.fullmatch("[0-9a-f]{40}", config.revision or "") else None
        if commit not in (None, content["revision"]):
            raise _other(config, f"data.revision={commit}", f"from commit {content['revision']}")
        return
    source = _at_hand(config)
    local = isinstance(config.source, str) and config.source != "sample"
    name = source.name if source else Path(config.source).expanduser().resolve().name if local else before
    if name != before:
        raise _other(config, f"data.source={config.source}", f"from {before}")
    then = settings.get("content")
    if source and then is not None and not (local and ":" not in then) and source.identity != then:  # ":" since 11/2026
        raise _other(config, f"data.source={config.source}", f"from other text called {before}, or before a change")


def _at_hand(config: DataConfig) -> Source | None:
    with suppress(Exception):  # training needs no source, so whatever keeps one from being opened is no error
        return open_source(config)
    return None


def _other(config: DataConfig, asked: str, found: str) -> UserError:
    folder = config.folder
    mend = f"prepare it into another data.dir, or train on what is there with data=shards data.dir={folder}"
    return UserError(f"{asked}: {folder} was prepared {found}; {mend}")
