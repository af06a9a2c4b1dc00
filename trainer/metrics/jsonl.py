"""metrics.jsonl: one JSON object a line, written so that a crash costs at most the line that was being written."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common import write_text

Line = dict[str, Any]
FILE = "metrics.jsonl"


EMPTY, TORN = "empty line", "last line cut short, as when its writer is killed; ignored"


def scan(raw: bytes) -> Iterator[tuple[int, Line | None, str]]:
    """Number (from 1), object and fault of every line of a file: an object without a fault, or None and its fault."""
    lines = raw.split(b"\n")
    whole = lines[-1] == b""
    for number, text in enumerate(lines[:-1] if whole else lines, 1):
        if not text.strip():
            yield number, None, EMPTY
            continue
        try:
            line = json.loads(text.decode().removeprefix("\ufeff"))  # a mark that editors put at a file's beginning
        except (ValueError, RecursionError):
            yield number, None, TORN if number == len(lines) else "not valid JSON"
            continue
        if isinstance(line, dict):
            yield number, line, ""
        else:
            yield number, None, f"a JSON {type(line).__name__} where an object was expected"


def read_lines(path: Path) -> list[Line]:
    """The lines of a record, each of a step; torn and foreign ones are left out.  Without a file there are none."""
    try:
        raw = path.read_bytes()
    except OSError:
        return []
    return [line for _, line, _ in scan(raw) if line is not None and _is_of_a_step(line)]


def _is_of_a_step(line: Line) -> bool:
    numbers = (line.get(key) for key in ("tokens", "train_time_s", "train/loss", "val/loss"))
    return type(line.get("step")) is int and all(isinstance(value, int | float | None) for value in numbers)


def encode(line: Mapping[str, Any]) -> str:
    return json.dumps(finite(line), allow_nan=False) + "\n"


def finite(line: Mapping[str, Any]) -> Line:
    """With null for what JSON has no number for: NaN and infinity."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}


class JsonLines:
    """Appends objects to a file, each line flushed; numbers keep their full precision, NaN and infinity become null.

    Args:
        path: created if it is missing.
        lines: what it shall hold; anything else in it is removed.
    """

    def __init__(self, path: Path, lines: Iterable[Line] = ()):
        self.lines = list(lines)
        write_text(path, "".join(map(encode, self.lines)))
        self.file = path.open("ab", buffering=0)
        self.unwritten = b""  # lines that a full disk has refused so far

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line, after those that could not be written before.

        Raises OSError: the disk is full or gone. The file then still ends with a whole line, and the refused ones are
        tried again by the next call.
        """
        self.lines.append(finite(line))
        self._write(self.unwritten + encode(line).encode())

    def retry(self) -> None:
        """Write the lines that were refused, if there are any; raises as ``append`` does."""
        if self.unwritten:
            self._write(self.unwritten)

    def _write(self, text: bytes) -> None:
        end = self.file.tell()
        try:
            if self.file.write(text) < len(text):
                raise OSError("the disk is full")
        except OSError:
            self.unwritten = text
            self.file.truncate(end)
            self.file.seek(end)
            raise
        self.unwritten = b""

    def close(self) -> None:
        self.file.close()
