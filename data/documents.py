"""What a source of text is: anything that names itself and yields its documents in a fixed order.

A source reads raw documents and says where it stands; decoding them is left to the threads that tokenize.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

BATCH_DOCUMENTS, BATCH_BYTES = 256, 2**20

Cursor = dict[str, Any]  # JSON-able: where a source continues


class BadDocument(Exception):
    """A document that cannot be tokenized; its argument is the kind under which the manifest counts it."""


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
        row = json.loads(decode_text(line.removeprefix(codecs.BOM_UTF8)))
    except (ValueError, RecursionError):
        raise BadDocument("invalid_json") from None
    text = row.get("text") if isinstance(row, dict) else None
    return decode_text(text if isinstance(text, str) else None)


class Document(NamedTuple):
    """One raw document, and the function that makes its text of it."""

    raw: Any
    decode: Callable[[Any], str] = decode_text  # runs on a thread; raises BadDocument


class Batch(NamedTuple):
    """Neighbouring documents of a source."""

    documents: list[Document]
    cursor: Cursor  # where the source continues after this batch
    fraction: float | None  # how much of the source has been read by then, 0…1, if it can be known


class Source(Protocol):
    """What `data.source._target_` names a class of; the settings beside `_target_` are its constructor's arguments.

    A folder is continued only by a source of the same `name`, `revision` and `identity`; one of the last two may be
    None. A source may also have `val_documents`, an int: the first so many documents are for validation, unless
    `data.val_tokens` says how much is; and `unread`, a dict of counts: what it leaves out as a whole, by the reason.
    """

    @property
    def name(self) -> str: ...  # for the manifest
    @property
    def revision(self) -> str | None: ...  # of what is read from elsewhere
    @property
    def identity(self) -> str | None: ...  # changes with the text, and with every setting that changes the text

    def batches(self, cursor: Cursor | None) -> Iterator[Batch]:
        """From `cursor` (one that a batch had, after a round trip through JSON) or the beginning: always the same."""
        ...


def batch_documents(documents: Iterable[tuple[Document, Cursor, float | None]]) -> Iterator[Batch]:
    """Group (document, cursor after it, fraction read by then) into batches.

    Where batches end depends on the documents since the last end alone, so resuming repeats it.
    """
    group, size = list[Document](), 0
    for document, cursor, fraction in documents:
        group.append(document)
        size += len(document.raw or "")
        if len(group) == BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield Batch(group, cursor, fraction)
            group, size = [], 0
    if group:
        yield Batch(group, cursor, fraction)
