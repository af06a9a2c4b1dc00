"""The `data` section of the configuration: every key, its type, unit and default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import UserError

ORDERS = ("shuffled", "sequential", "llmc")


@dataclass
class DataConfig:
    name: str = "sample"  # names the default folder and the shard files
    # sample | shards | a folder of .parquet, .jsonl[.gz|.zst], .txt | hub:OWNER/DATASET[:SUBSET]
    # | {_target_: MODULE.CLASS, SETTING: VALUE, …}, a source of one's own: data/documents.py
    source: Any = "sample"
    pretokenized: str | None = None  # OWNER/DATASET on the hub that holds ready-made shards
    revision: str | None = None  # branch, tag or commit of a hub source; null: the newest
    dir: str | None = None  # folder of the shards; null: $NANOMUON_DATA or ~/.cache/nanomuon, then NAME-TOKENIZER
    tokenizer: str | None = None  # gpt2 | byte | a tiktoken encoding; null: the manifest's, else gpt2
    # shuffled: a permutation of windows each epoch, by `seed` | sequential: the speedrun's | llmc: data/llmc.py
    order: str = "shuffled"
    document_mask: bool = False  # attention stays inside a document
    download: bool = False  # fetch ready-made shards from `pretokenized` when the folder has none
    tokens: int | None = None  # training tokens to prepare or fetch; null: all
    shard_tokens: int = 100_000_000  # tokens in a shard
    val_tokens: int | None = None  # validation tokens; null: one shard, or a tenth of a corpus smaller than that
    validation: str = "first"  # first: the source's beginning, as in the speedrun | spread: all over it
    workers: int | None = None  # threads that tokenize; null: one for each available core

    def check(self) -> None:
        """Raises UserError (a ValueError) with one line that names the key, the value and what to do."""
        for key, least in [("tokens", 1), ("val_tokens", 1), ("shard_tokens", 1), ("workers", 1)]:
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"data.{key}={value}: must be at least {least}")
        if self.shard_tokens >= 2**31:
            raise UserError(f"data.shard_tokens={self.shard_tokens}: a shard holds at most {2**31 - 1} tokens")
        check_order(self.order)
        if self.validation not in ("first", "spread"):
            raise UserError(f"data.validation={self.validation}: choose first or spread")
        if self.dir is not None and not self.dir.strip():  # of a variable of the shell that is not set, most often
            raise UserError(f"data.dir={self.dir}: it is empty; give a folder, or leave it out")
        if not self.name.strip() or "/" in self.name or not self.name.isprintable() or len(self.name.encode()) > 200:
            raise UserError(f"data.name={self.name!r}: must be a plain word, it names files")
        if not isinstance(self.source, str | Mapping):
            raise UserError(f"data.source={self.source}: give a folder as text, such as ./{self.source}")
        if isinstance(self.source, Mapping) and "." not in str(target := self.source.get("_target_")):
            raise UserError(f"data.source._target_={target}: name a class as MODULE.CLASS, such as mine.MySource")
        if self.source == "shards" and self.dir is None:
            raise UserError("data.dir is not set: data=shards needs data.dir=FOLDER with *_train_*.bin and *_val_*.bin")
        if self.download and self.pretokenized is None:
            raise UserError("data.download=true: data.pretokenized names no hub repository to fetch shards from")

    @property
    def folder(self) -> Path:
        """Where the shards are or will be."""
        if self.dir is not None:
            return Path(self.dir).expanduser()
        root = Path(os.environ.get("NANOMUON_DATA") or "~/.cache/nanomuon").expanduser()
        return root / f"{self.name}-{self.tokenizer or 'gpt2'}"


def check_order(order: str) -> None:
    """Raises UserError: there is no such order."""
    if order not in ORDERS:
        raise UserError(f"data.order={order}: choose one of {', '.join(ORDERS)}")
