"""What an offline W&B run has written."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_offline_run(path: Path, timeout: float = 120) -> list[Any]:
    """All records of a run that has ended; W&B's own process writes them a little later."""
    deadline, records = time.monotonic() + timeout, []
    while not records or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, f"{path} is not complete after {timeout} s"
        time.sleep(0.1)
        records = list(_records(path))
    return records


def _records(path: Path) -> Iterator[Any]:
    """The file is a LevelDB log (32 KiB blocks; crc, length, type of a piece) behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""
