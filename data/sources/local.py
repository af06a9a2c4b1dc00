"""Text from a local folder: `.parquet` and `.jsonl[.gz|.zst]` with a column `text` (FineWeb's schema), and `.txt`.

Files are read in the order of their paths; each row is a document, a `.txt` file is one document.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from common import UserError
from data.documents import Batch, Cursor, Document, batch_documents, decode_json

Rows = Iterator[tuple[Document, int, float]]  # document, rows read by then, part of the file read by then


class LocalText:
    """The documents of a folder (or of one file). Raises UserError if there is none."""

    revision = None

    def __init__(self, source: str) -> None:
        root = Path(source).expanduser().resolve()
        found = [root] if root.is_file() else root.rglob("*")
        self.files = sorted(file for file in found if _read(file, 0) is not None and file.is_file())
        if not self.files:
            missing = "" if root.exists() else " does not exist"
            raise UserError(f"data.source={source}{missing}: no .parquet, .jsonl[.gz|.zst] or .txt file; name a folder")
        self.sizes = [file.stat().st_size for file in self.files]
        names = [str(file.relative_to(root.parent)) for file in self.files]
        self.name = root.name
        self.identity = hashlib.sha256(repr(list(zip(names, self.sizes, strict=True))).encode()).hexdigest()

    def batches(self, cursor: Cursor | None) -> Iterator[Batch]:
        """From `cursor`, or the beginning. Raises UserError naming a file that cannot be read."""
        return batch_documents(self._documents(**(cursor or {"file": 0, "row": 0})))

    def _documents(self, file: int, row: int) -> Iterator[tuple[Document, Cursor, float]]:
        total, before = max(1, sum(self.sizes)), sum(self.sizes[:file])
        for index, path in enumerate(self.files[file:], file):
            try:
                for document, position, part in _read(path, row if index == file else 0) or ():
                    cursor = {"file": index, "row": position}
                    yield document, cursor, (before + part * self.sizes[index]) / total
            except (OSError, ValueError) as error:  # pyarrow's errors are among these
                raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
            before += self.sizes[index]


def _read(path: Path, row: int) -> Rows | None:
    """The documents of a file from `row` on, None by its name if it is none of text."""
    if path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        return _lines(path, row)
    return _rows(path, row) if path.suffix == ".parquet" else _whole(path, row) if path.suffix == ".txt" else None


def _whole(path: Path, row: int) -> Rows:
    if row == 0:
        yield Document(path.read_bytes()), 1, 1.0


def _lines(path: Path, row: int) -> Rows:
    size = max(1, path.stat().st_size)
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    # pyarrow's streams read members that were appended and report a truncated file; zstandard's do neither.
    with open(path, "rb") as file, io.BufferedReader(pa.input_stream(file, compression), 2**16) as stream:
        for position, line in enumerate(stream, 1):
            if position > row and not line.isspace():
                yield Document(line, decode_json), position, file.tell() / size


def _rows(path: Path, row: int) -> Rows:
    with pq.ParquetFile(path) as file:
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        position = group = 0
        while group < len(rows) and position + rows[group] <= row:
            position += rows[group]
            group += 1
        for values in _texts(file, list(range(group, len(rows)))):
            for raw in values:
                position += 1
                if position > row:
                    yield Document(raw), position, position / sum(rows)


def _texts(file: pq.ParquetFile, groups: list[int]) -> Iterator[list[bytes | None]]:
    """The column `text` of some row groups of a ParquetFile, as bytes: invalid UTF-8 in one must not cost others."""
    schema = file.schema_arrow
    kind = schema.field("text").type if "text" in schema.names else pa.null()
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        for group in groups:
            yield [None] * file.metadata.row_group(group).num_rows
        return
    for batch in file.iter_batches(1024, row_groups=groups, columns=["text"]):
        yield batch.column(0).cast(pa.large_binary()).to_pylist()
