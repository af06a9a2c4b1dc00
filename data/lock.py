"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from common import UserError


@contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder, made if needed, for oneself; the lock goes with the process, however it ends.

    A folder that is still empty at the end is removed. Raises UserError if another process holds it and not `wait`.
    """
    path = folder / ".lock"  # not the folder itself: NFS locks only what is open for writing
    try:
        file = _acquire(path, wait)
    except BlockingIOError:
        raise UserError(f"data.dir={folder}: another preparation is at work there; wait until it ends") from None
    except OSError as error:
        raise UserError(f"data.dir={folder}: cannot be used ({error.strerror}); choose another") from None
    with file:
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()  # while it is held: whoever waits for it notices, and makes another
                folder.rmdir()


def _acquire(path: Path, wait: bool) -> IO[bytes]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # its last holder has removed it, or the folder, in between
            file = open(path, "ab")  # noqa: SIM115 (the caller closes it)
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
