"""Text from a local folder: `.parquet` and `.jsonl` with a column `text` (FineWeb's schema), and `.txt`.

Files are read in the order of their paths; each row is a document, a `.txt` file is one document. Every file is
read, counted with the reason why not, or stops the preparation; docs/data.md has the list.
"""

from __future__ import annotations

import hashlib
import io
import os
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from common import UserError
from data.documents import BadDocument, Batch, Cursor, Document, batch_documents, decode_json, decode_text

Rows = Iterator[tuple[Document, int, float]]  # document, rows read by then, part of the file read by then
ENDS = 2**16  # bytes at either end of a file that its identity is made of
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
COMPRESSED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}  # the first bytes of such a file
LFS = b"version https://git-lfs"
TEXT_TYPES = [pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_fixed_size_binary]
TEXT_TYPES += [pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view]


class LocalText:
    """The documents of a folder (or of one file). Raises UserError if there is none."""

    revision = None

    def __init__(self, source: str) -> None:
        root = Path(os.path.realpath(Path(source).expanduser()))  # where resolve() fails for a circle of links
        try:
            self.files, self.unread = _find(root)
            self.sizes = [file.stat().st_size for file in self.files]
            names = [str(file.relative_to(root.parent)) for file in self.files]
            ends = [_ends(file, size) for file, size in zip(self.files, self.sizes, strict=True)]
        except OSError as error:
            raise UserError(f"data.source={source}: {error.filename} cannot be read ({error.strerror})") from None
        if not self.files:
            found = ", ".join(f"{count} {kind}" for kind, count in sorted(self.unread.items())) or "nothing in it"
            missing = f"({found})" if root.exists() else "(it does not exist)"
            raise UserError(f"data.source={source}: no .parquet, .jsonl[.gz|.zst] or .txt {missing}; name a folder")
        self.name = root.name
        what = repr(list(zip(names, self.sizes, ends, strict=True)))
        self.identity = f"sha256:{hashlib.sha256(what.encode()).hexdigest()}"

    def batches(self, cursor: Cursor | None) -> Iterator[Batch]:
        """From `cursor`, or the beginning. Raises UserError naming a file that cannot be read."""
        return batch_documents(self._documents(**(cursor or {"file": 0, "row": 0})))

    def _documents(self, file: int, row: int) -> Iterator[tuple[Document, Cursor, float]]:
        total, before = max(1, sum(self.sizes)), sum(self.sizes[:file])
        for index, path in enumerate(self.files[file:], file):
            try:
                for document, position, part in _read(path, row if index == file else 0):
                    cursor = {"file": index, "row": position}
                    yield document, cursor, (before + part * self.sizes[index]) / total
            except (OSError, ValueError) as error:  # pyarrow's errors are among these
                raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
            before += self.sizes[index]


def _find(root: Path) -> tuple[list[Path], Counter[str]]:
    """The files of text, links followed and each taken once, by path; and how many others there are of each kind."""
    files, others, seen, waiting = list[Path](), Counter[str](), set[tuple[int, int]](), [root]
    while waiting:
        path = waiting.pop()
        if path != root and path.name.startswith("."):
            others["hidden"] += 1
            continue
        if not os.path.exists(path):
            others["broken_link"] += 1
            continue
        about = path.stat()
        itself = about.st_dev, about.st_ino  # the same behind every link, hard ones too
        if itself in seen:
            others["linked_again"] += 1
        elif path.is_dir():
            waiting += sorted(path.iterdir(), reverse=True)
        elif _reader(path) is None or not path.is_file():
            others[f"unread {''.join(path.suffixes[-2:]) or path.name}"] += 1
        elif _reader(path) is _lines and about.st_size == 0 and path.suffix.lower() not in COMPRESSIONS:
            others["empty_file"] += 1
        else:
            files.append(path)
        seen.add(itself)
    return sorted(files), others


def _ends(path: Path, size: int) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(ENDS))
        file.seek(max(0, size - ENDS))
        digest.update(file.read(ENDS))
    return digest.hexdigest()


def _reader(path: Path) -> Callable[[Path, int], Rows] | None:
    """What yields the documents of a file from a row on, None if its name is not that of text."""
    name = path.name.lower()
    if name.removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".ndjson")):
        return _lines
    return _rows if name.endswith(".parquet") else _whole if name.endswith(".txt") else None


def _read(path: Path, row: int) -> Rows:
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            raise ValueError("a Git LFS pointer, the text is not here: run `git lfs pull`")
    reader = _reader(path)
    assert reader is not None  # or _find would have left it out
    return reader(path, row)


def _whole(path: Path, row: int) -> Rows:
    if row == 0:
        yield Document(path.read_bytes().removeprefix(BOM_UTF8), _decode_file), 1, 1.0


def _decode_file(raw: bytes) -> str:
    text = decode_text(raw)
    if "\0" in text[:4096]:  # UTF-16 without a mark, or no text at all
        raise BadDocument("nul_bytes")
    return text


def _lines(path: Path, row: int) -> Rows:
    size = path.stat().st_size
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression and size == 0:
        raise ValueError(f"0 bytes are no {compression} file: it was cut off")
    # pyarrow's streams read members that were appended and report a truncated file; zstandard's do neither.
    with open(path, "rb") as file, io.BufferedReader(pa.input_stream(file, compression), 2**16) as stream:
        _check_lines(stream.peek(64))
        for position, line in enumerate(stream, 1):
            if position > row and not line.isspace():
                yield Document(line, decode_json), position, file.tell() / size


def _check_lines(head: bytes) -> None:
    """Raises ValueError for what is known, by its beginning, to be no lines of JSON at all."""
    for beginning, ending in COMPRESSED.items():
        if head.startswith(beginning):
            raise ValueError(f"compressed, which its name does not say: let it end in .jsonl{ending}")
    if head.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or b"\0" in head[:4]:
        raise ValueError("UTF-16 or UTF-32: convert it to UTF-8")
    if head.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
        raise ValueError("a JSON array, not one object a line: `jq -c '.[]'` makes lines of it")


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
    if schema.names.count("text") > 1:
        raise ValueError(f"{schema.names.count('text')} columns are called `text`: rename all but one")
    kind = schema.field("text").type if "text" in schema.names else pa.null()
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(fits(kind) for fits in TEXT_TYPES):
        for group in groups:
            yield [None] * file.metadata.row_group(group).num_rows
        return
    for batch in file.iter_batches(1024, row_groups=groups, columns=["text"]):
        column = batch.column(0)
        column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        yield column.cast(pa.large_binary()).to_pylist()
