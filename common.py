"""What every room stands on: the one error for users' mistakes, and files that are whole or not there.

Nothing here imports torch, or anything else of this project.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LAUNCHER = os.getppid()
"""The process that has started this one."""


class UserError(ValueError):
    """What the user can mend: one line that names the key or the file, its value, and the mend."""


@contextmanager
def atomic_write(path: Path | str, *, exclusive: bool = False) -> Iterator[IO[bytes]]:
    """A binary file that appears under ``path`` complete and durable, or not at all.

    Raises:
        FileExistsError: it is there already, and shall not be replaced (``exclusive``).
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # mkstemp's 0600 would hide the file from other users
            os.fsync(file.fileno())
        if exclusive:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """The whole text in UTF-8, or the file as it was."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path | str, value: Any, *, exclusive: bool = False) -> None:
    with atomic_write(path, exclusive=exclusive) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
