"""`manifest.json`: what a folder of shards holds, and the proof that it still does.

The manifest carries the sha256 of every shard and one of its own content, so that any change is seen.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from common import UserError, write_json
from data.shards import bin_files, open_shard, split_of
from data.tokenizer import Tokenizer

NAME = "manifest.json"
FORMAT = 1
KEYS: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "name": str,
    "source": str,
    "revision": (str, type(None)),
    "settings": dict,  # those that decide the bytes
    "tokenizer": dict,  # name, vocab_size, sha256
    "documents": dict,  # written, and the counts of each kind of bad document
    "tokens": dict,  # train, val
    "shards": list,  # in the order of the text: file, split (none before November 2026), tokens, sha256
    "checksum": str,
}
VOCABULARY = {"name": str, "vocab_size": int, "sha256": str}
ENTRY = {"file": str, "tokens": int, "sha256": str}


def _checksum(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(name: str, source: str, revision: str | None, settings: dict, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the bytes of a folder's shards: the first entries of its manifest."""
    vocabulary = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
    return {"name": name, "source": source, "revision": revision, "settings": settings, "tokenizer": vocabulary}


def write_manifest(folder: Path, identity: dict, documents: dict[str, int], files: list[Path]) -> dict[str, Any]:
    """Write the manifest of the shards `files`, atomically, and return it. `identity`: from `describe`."""
    totals, shards = {"train": 0, "val": 0}, []
    for file in files:
        split, tokens = split_of(file.name), len(open_shard(file))
        assert split is not None  # the names are the writer's, or those that the download has chosen
        shards.append({"file": file.name, "split": split, "tokens": tokens, "sha256": file_sha256(file)})
        totals[split] += tokens
    content = {"format": FORMAT, **identity, "documents": documents, "shards": shards, "tokens": totals}
    content["checksum"] = _checksum(content)
    write_json(folder / NAME, content)
    return content


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, None without one. Raises UserError if it was altered or is not a manifest."""
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a manifest")
    for key, kind in KEYS.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path}: {key} is missing or of the wrong type")
    for entry, kinds in [(content["tokenizer"], VOCABULARY), *((entry, ENTRY) for entry in content["shards"])]:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in kinds.items()):
            raise UserError(f"{path}: {entry} lacks one of {', '.join(kinds)}, or has another type there")
    for entry in content["shards"]:
        plain = Path(entry["file"]).name == entry["file"] and entry["file"].isprintable()
        if entry.get("split", "train") not in ("train", "val") or not plain:
            raise UserError(f"{path}: {entry} is no file of this folder for train or val")
    if len({entry["file"] for entry in content["shards"]}) < len(content["shards"]):
        raise UserError(f"{path}: one of its shards stands there twice")
    if content["checksum"] != _checksum(content):
        raise UserError(f"{path}: was altered, its checksum does not fit its content")
    if content["format"] != FORMAT:
        raise UserError(f"{path}: format {content['format']} is not this program's ({FORMAT})")
    return content


def check_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """The cheap part of verification: the shards are those of the manifest, open, and hold the tokens it counts.

    Raises UserError naming the file and what is wrong with it.
    """
    for entry in manifest["shards"]:
        _check_count(folder / entry["file"], open_shard(folder / entry["file"]), entry)
    for line in _unknown(folder, manifest):
        raise UserError(f"{line}; remove it or prepare the folder anew")


def verify_folder(folder: Path) -> list[str]:
    """Everything wrong with a folder of shards, one line each: headers, sizes, token range, sha256, unknown files.

    Without a manifest only headers and sizes can be checked.
    """
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    files = [file.name for file in bin_files(folder)]
    if manifest is None and not files:
        return [f"{folder}: {'holds no shards' if folder.is_dir() else 'no such folder'}"]
    problems = _unknown(folder, manifest) if manifest else []
    for entry in manifest["shards"] if manifest else [{"file": file} for file in files]:
        path = folder / entry["file"]
        try:
            tokens = open_shard(path)
            if manifest:
                _check_content(path, tokens, entry, manifest["tokenizer"]["vocab_size"])
        except UserError as error:
            problems.append(str(error))
    return problems


def _unknown(folder: Path, manifest: dict[str, Any]) -> list[str]:
    known = {entry["file"] for entry in manifest["shards"]}
    return [f"{file}: not in the manifest" for file in bin_files(folder) if file.name not in known]


def _check_count(path: Path, tokens: np.ndarray, entry: dict[str, Any]) -> None:
    if len(tokens) != entry["tokens"]:
        raise UserError(f"{path}: holds {len(tokens)} tokens, the manifest says {entry['tokens']}")


def _check_content(path: Path, tokens: np.ndarray, entry: dict[str, Any], vocab_size: int) -> None:
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise UserError(f"{path}: token {largest} is not in the vocabulary of {vocab_size}")
    _check_count(path, tokens, entry)
    if file_sha256(path) != entry["sha256"]:
        raise UserError(f"{path}: its sha256 is not the manifest's: the content has changed")
