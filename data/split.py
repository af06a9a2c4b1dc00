"""From the configuration to files: which shards are for training and which for validation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from common import UserError
from data import manifest
from data.config import DataConfig
from data.shards import open_shard
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
    folder was written with another tokenizer than `config.tokenizer`.
    """
    config.check()
    folder = config.folder
    train, val = (sorted(folder.glob(f"*_{split}_*.bin")) for split in ("train", "val"))
    if not train or not val:
        raise UserError(f"{folder} holds no {'train' if not train else 'val'} shards: {_how_to_prepare(config)}")
    content = manifest.read_manifest(folder)
    name = config.tokenizer or "gpt2"
    fingerprint = _fingerprint(val + train)
    if content is not None:
        manifest.check_folder(folder, content)
        name = content["tokenizer"]["name"]
        if config.tokenizer not in (None, name):
            raise UserError(f"data.tokenizer={config.tokenizer}: {folder} was written with data.tokenizer={name}")
    tokenizer = load_tokenizer(name)
    if content is not None and content["tokenizer"]["sha256"] != tokenizer.sha256:
        raise UserError(f"data.tokenizer={name}: {folder} was written with another vocabulary; prepare it anew")
    return TrainValSplit(train, val, name, tokenizer.vocab_size, tokenizer.eos, fingerprint)


def _fingerprint(files: list[Path]) -> str:
    """Of the names, token counts and first tokens of shards: cheap, and other text or another tokenizer changes it."""
    digest = hashlib.sha256()
    for file in files:
        tokens = open_shard(file)
        digest.update(f"{file.name} {len(tokens)} ".encode() + tokens[:4096].tobytes())
    return digest.hexdigest()


def _how_to_prepare(config: DataConfig) -> str:
    if config.source == "shards":
        return "data=shards needs data.dir=FOLDER with files *_train_*.bin and *_val_*.bin"
    where = f" data.dir={config.dir}" if config.dir else ""
    source = " data.source=FOLDER" if config.name == "local" else ""
    fetch = " (or add data.download=true)" if config.pretokenized else ""
    return f"run `python scripts/prepare_data.py data={config.name}{source}{where}` first{fetch}"
