"""`manifest.json`: what a folder of shards holds, and the proof that it still does.

The manifest carries the sha256 of every shard and one of its own content, so that any change is seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common import UserError, write_json
from data.shards import HEADER_BYTES, open_shard

NAME = "manifest.json"
FORMAT = 1
KEYS = {
    "format": int,
    "name": str,
    "source": str,
    "revision": (str, type(None)),
    "settings": dict,  # those that decide the bytes: a folder is continued only with the same
    "tokenizer": dict,  # name, vocab_size, sha256
    "documents": dict,  # written, and the counts of each kind of bad document
    "tokens": dict,  # train, val
    "shards": list,  # in the order of the text: file, tokens, sha256
    "checksum": str,
}


def _checksum(content: dict) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_shard(path: Path) -> dict:
    """The manifest's entry for one shard."""
    return {"file": path.name, "tokens": len(open_shard(path)), "sha256": file_sha256(path)}


def write_manifest(folder: Path, content: dict) -> dict:
    """Complete `content` with format, token totals and checksum, write it atomically, and return it."""
    totals = {
        split: sum(shard["tokens"] for shard in content["shards"] if split_of(shard["file"]) == split)
        for split in ("train", "val")
    }
    content = {"format": FORMAT, **content, "tokens": totals}
    content["checksum"] = _checksum(content)
    write_json(folder / NAME, content)
    return content


def split_of(file: str) -> str:
    """`train` or `val`, from a shard's name, as the speedrun writes it: NAME_train_000001.bin."""
    return "val" if "_val_" in file else "train"


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a folder, None without one. Raises UserError if it was altered or is not a manifest."""
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a manifest")
    for key, kind in KEYS.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path}: {key} is missing or of the wrong type")
    if content["checksum"] != _checksum(content):
        raise UserError(f"{path}: was altered, its checksum does not fit its content")
    if content["format"] != FORMAT:
        raise UserError(f"{path}: format {content['format']} is not this program's ({FORMAT})")
    return content


def check_folder(folder: Path, manifest: dict) -> None:
    """The cheap part of verification: every shard is there, opens, and holds the tokens that the manifest counts.

    Raises UserError naming the file and the fault.
    """
    for entry in manifest["shards"]:
        held = len(open_shard(folder / entry["file"]))
        if held != entry["tokens"]:
            raise UserError(f"{folder / entry['file']}: holds {held} tokens, the manifest says {entry['tokens']}")


def faults(folder: Path, progress: Callable[[str, int], None] = lambda file, size: None) -> list[str]:
    """Everything wrong with a folder of shards, one line each: headers, sizes, token range, sha256, strays.

    Without a manifest only headers and sizes can be checked. `progress(file, bytes)` is called after each shard.
    """
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    files = sorted(folder.glob("*.bin"))
    if manifest is None and not files:
        return [f"{folder}: {'holds no shards' if folder.is_dir() else 'no such folder'}"]
    entries = {entry["file"]: entry for entry in manifest["shards"]} if manifest else {}
    names = entries or [file.name for file in files]
    found = [f"{file}: not in the manifest" for file in files if file.name not in names]
    for name in names:
        try:
            tokens = open_shard(folder / name)
            if manifest:
                _check_content(folder / name, tokens, entries[name], manifest["tokenizer"]["vocab_size"])
            progress(name, HEADER_BYTES + tokens.nbytes)
        except UserError as error:
            found.append(str(error))
    return found


def _check_content(path: Path, tokens: np.ndarray, entry: dict, vocab_size: int) -> None:
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise UserError(f"{path}: token {largest} is not in the vocabulary of {vocab_size}")
    if len(tokens) != entry["tokens"]:
        raise UserError(f"{path}: holds {len(tokens)} tokens, the manifest says {entry['tokens']}")
    if file_sha256(path) != entry["sha256"]:
        raise UserError(f"{path}: its sha256 is not the manifest's: the content has changed")
