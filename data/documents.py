"""What a source of text yields, and how its raw documents become strings.

A source reads raw bytes in order and says where it stands; decoding is left to the threads that tokenize.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

BATCH_DOCUMENTS, BATCH_BYTES = 256, 2**20


class BadDocument(Exception):
    """A document that cannot be tokenized; its argument is the kind under which the manifest counts it."""


class Batch(NamedTuple):
    """Neighbouring documents of a source."""

    items: list[tuple[Callable[[Any], str], Any]]  # each document raw, with what decodes it
    cursor: dict  # JSON-able: where the source continues after this batch
    fraction: float | None  # how much of the source has been read by then, 0…1, if it can be known


class Item(NamedTuple):
    """One raw document, and where the source stands after it."""

    decode: Callable[[Any], str]
    raw: Any
    cursor: Callable[[], dict]  # called once a batch only: a cursor can be costly
    fraction: float | None


def batches(items: Iterable[Item]) -> Iterator[Batch]:
    """Group documents; where batches end depends on the documents since the last end alone, so resuming repeats it."""
    group, size = [], 0
    for item in items:
        group.append((item.decode, item.raw))
        size += len(item.raw or "")
        if len(group) == BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield Batch(group, item.cursor(), item.fraction)
            group, size = [], 0
    if group:
        yield Batch(group, item.cursor(), item.fraction)


def decode_text(raw: bytes | str | None) -> str:
    """A value of the column `text`. Raises BadDocument."""
    if raw is None or not isinstance(raw, bytes | str):
        raise BadDocument("missing_text")
    try:
        return raw.decode() if isinstance(raw, bytes) else raw
    except UnicodeDecodeError:
        raise BadDocument("invalid_utf8") from None


def decode_json(line: bytes) -> str:
    """The field `text` of one line of JSON. Raises BadDocument."""
    try:
        row = json.loads(decode_text(line))
    except (ValueError, RecursionError):
        raise BadDocument("invalid_json") from None
    text = row.get("text") if isinstance(row, dict) else None
    return decode_text(text if isinstance(text, str) else None)
