"""Files of one JSON object a line, written so that a crash costs at most the line that was being written."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import write_text

Line = dict[str, Any]


def parse(text: str) -> Line | None:
    """The object of one line, or None for a torn or foreign line."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


class JsonLines:
    """Appends objects to a file, each line flushed; numbers keep their full precision, NaN and infinity become null.

    Args:
        path: created if it is missing.
        last_step: lines of later steps, and a torn last line, are removed first; -1 empties the file.
    """

    def __init__(self, path: Path, last_step: int = -1):
        self.lines: list[Line] = []  # what the file holds
        if path.exists():
            found = [parse(text) for text in path.read_text(encoding="utf-8", errors="replace").splitlines()]
            self.lines = [line for line in found if line and line.get("step", math.inf) <= last_step]
            write_text(path, "".join(map(_encode, self.lines)))
        self.file = path.open("ab", buffering=0)
        self.unwritten = b""  # lines that a full disk has refused so far

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line, after those that could not be written before.

        Raises:
            OSError: the disk is full or gone.  The file then still ends with a whole line, and the refused ones
                are tried again by the next call.
        """
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
        self.lines.append(clean)
        self._write(self.unwritten + _encode(clean).encode())

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


def _encode(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
