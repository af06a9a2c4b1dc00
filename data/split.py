"""From the configuration to files: which shards are for training and which for validation."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import UserError
from data import manifest
from data.config import DataConfig
from data.origin import check_origin
from data.shards import bin_files, open_shard, split_of
from data.tokenizer import load_tokenizer


@dataclass
class TrainValSplit:
    """The files of a prepared folder, in order, and the tokenizer that wrote them."""

    train: list[Path]
    val: list[Path]
    tokenizer: str
    vocab_size: int
    eos: int  # the token that starts each document
    fingerprint: str = ""  # whether these are still the same shards; see _fingerprint


def open_split(config: DataConfig) -> TrainValSplit:
    """The shards of `config.folder`, their headers and sizes checked.

    Raises UserError if there are none (saying how to prepare them), if a file is missing or corrupt, or if the
    folder was written with another tokenizer or from another source than `config` asks for.
    """
    config.check()
    folder = config.folder
    content = manifest.read_manifest(folder)
    train, val, beginnings = _files(folder, content)
    if not train or not val:
        raise UserError(f"{folder} holds no {'train' if not train else 'val'} shards: {_how_to_prepare(config)}")
    name = config.tokenizer or "gpt2"
    if content is not None:
        manifest.check_folder(folder, content)
        check_origin(config, content)
        name = content["tokenizer"]["name"]
        if config.tokenizer not in (None, name):
            written = f"{folder} was written with data.tokenizer={name}"
            raise UserError(f"data.tokenizer={config.tokenizer}: {written}: give that, or another data.dir")
    tokenizer = load_tokenizer(name)
    if content is not None and content["tokenizer"]["sha256"] != tokenizer.sha256:
        raise UserError(f"data.tokenizer={name}: {folder} was written with another vocabulary; prepare it anew")
    fingerprint = _fingerprint({file: beginnings[file] for file in val + train}, content)
    return TrainValSplit(train, val, name, tokenizer.vocab_size, tokenizer.eos, fingerprint)


def _files(folder: Path, content: dict[str, Any] | None) -> tuple[list[Path], list[Path], dict[Path, bytes]]:
    """Training and validation shards: those of the manifest, or those whose names say so where there is none; and how
    each begins."""
    if content is not None:
        roles = {folder / entry["file"]: entry.get("split") or split_of(entry["file"]) for entry in content["shards"]}
    else:
        roles = {file: split_of(file.name) for file in bin_files(folder)}
    for file, role in roles.items():
        if role is None and _is_shard(file):  # other files may be called .bin too
            raise UserError(f"{file}: for training or validation? Call it NAME_train_000001.bin or NAME_val_000000.bin")
    train, val = ([file for file, role in roles.items() if role == split] for split in ("train", "val"))
    beginnings = {file: _beginning(file) for file in train + val}
    seen: dict[bytes, Path] = {}
    for file in train + val:  # a link, or a copy under another name
        twin = seen.setdefault(beginnings[file], file)
        if twin in train and file in val:
            raise UserError(f"{file} holds the tokens of {twin}: a file is never for both; replace one of them")
        if twin != file and content is None:  # prepared text may repeat itself
            raise UserError(f"{file} holds the tokens of {twin}, which would count twice; remove one of them")
    return train, val, beginnings


def _beginning(file: Path) -> bytes:
    """The number of a shard's tokens, and the first of them."""
    tokens = open_shard(file)
    return f"{len(tokens)} ".encode() + tokens[:4096].tobytes()


def _is_shard(file: Path) -> bool:
    with suppress(UserError):
        open_shard(file)
        return True
    return False


def _fingerprint(beginnings: dict[Path, bytes], content: dict[str, Any] | None) -> str:
    """Of the names, token counts and first tokens of shards, cheaply, and of all tokens where a manifest has hashes."""
    digest = hashlib.sha256(repr([entry["sha256"] for entry in content["shards"]]).encode() if content else b"")
    for file, beginning in beginnings.items():
        digest.update(f"{file.name} ".encode() + beginning)
    return digest.hexdigest()


def _how_to_prepare(config: DataConfig) -> str:
    if config.source == "shards":
        return "data=shards needs data.dir=FOLDER with files *_train_*.bin and *_val_*.bin"
    where = f" data.dir={config.dir}" if config.dir else ""
    source = " data.source=FOLDER" if config.name == "local" else ""
    fetch = " (or add data.download=true)" if config.pretokenized else ""
    return f"run `python scripts/prepare_data.py data={config.name}{source}{where}` first{fetch}"
