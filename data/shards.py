"""Token shards: the `.bin` format of llm.c and modded-nanogpt.

A shard is a header of 256 little-endian int32, `[magic, version, n_tokens, 0, …]`, then the tokens.
GPT-2's shards have magic 20240520, version 1 and uint16 tokens; llm.c's variant for larger vocabularies
has magic 20240801, version 7 and uint32 tokens.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from common import UserError, atomic_write

HEADER_BYTES = 256 * 4
FORMATS: dict[tuple[int, int], np.dtype] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
MAX_TOKENS = 2**31 - 1  # the count is an int32
ROLE = re.compile(r"(?:^|_)(train|val)(?:_\d+)?\.bin\Z", re.IGNORECASE)


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype of the format that holds every token below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def header(n_tokens: int, dtype: np.dtype) -> bytes:
    """The 1024 bytes that precede `n_tokens` tokens of `dtype`. Raises UserError if the count does not fit."""
    if n_tokens > MAX_TOKENS:
        raise UserError(f"{n_tokens} tokens do not fit in one shard (at most {MAX_TOKENS})")
    fields = np.zeros(256, dtype="<i4")
    fields[:2] = next(key for key, value in FORMATS.items() if value == dtype)
    fields[2] = n_tokens
    return fields.tobytes()


def split_of(file: str) -> str | None:
    """`train` or `val` by the end of a shard's name, NAME_train_000001.bin or NAME_val.bin; None if it says neither."""
    found = ROLE.search(file)
    return found and found[1].lower()


def bin_files(folder: Path) -> list[Path]:
    """The files of a folder that may be shards, in any case: `.BIN` is what some disks and tools make of them.  Hidden
    ones are not, such as the `._x_train_1.bin` that a Mac leaves beside x_train_1.bin.

    In the order of their numbers where those have no leading zeros: x_train_2.bin comes before x_train_10.bin.
    """
    files = (file for file in folder.glob("[!.]*") if file.suffix.lower() == ".bin")
    return sorted(files, key=lambda file: (re.sub(r"\d+", lambda number: number[0].zfill(20), file.name), file))


def write_shard(path: Path | str, tokens: ArrayLike, dtype: DTypeLike = np.uint16) -> None:
    """Write one shard, atomically. `tokens`: integers [n]; `dtype`: uint16, or uint32 for vocabularies over 65,536.

    Raises UserError if a token does not fit the dtype.
    """
    dtype = np.dtype(dtype).newbyteorder("<")
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size and not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{path}: tokens must be one row of integers, not {tokens.dtype} {list(tokens.shape)}")
    if tokens.size and (tokens.min() < 0 or tokens.max() > np.iinfo(dtype).max):
        raise UserError(f"{path}: tokens outside 0…{np.iinfo(dtype).max} do not fit {dtype.name}")
    with atomic_write(Path(path)) as file:
        file.write(header(len(tokens), dtype))
        file.write(tokens.astype(dtype, copy=False).data)


def open_shard(path: Path | str) -> np.memmap:
    """The tokens of a shard, memory-mapped read-only: uint16 or uint32 [n_tokens].

    Checks magic, version, count and file size. Raises UserError naming the file and what is wrong with it.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if not path.is_file():  # a FIFO would be waited for
            raise UserError(f"{path}: cannot be read (a folder, a FIFO or a device, not a file)")
        with open(path, "rb") as file:
            fields = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(fields) < HEADER_BYTES:
        raise UserError(f"{path}: {size} bytes are too few for a shard's header of {HEADER_BYTES}")
    magic, version, n_tokens = (int(field) for field in fields.view("<i4")[:3])
    dtype = FORMATS.get((magic, version))
    if dtype is None:
        known = " or ".join(f"{m} version {v}" for m, v in FORMATS)
        raise UserError(f"{path}: magic {magic} version {version} is not a token shard's ({known})")
    if n_tokens <= 0:
        raise UserError(f"{path}: the header counts {n_tokens} tokens")
    expected = HEADER_BYTES + n_tokens * dtype.itemsize
    if size != expected:
        raise UserError(f"{path}: {size} bytes, but a header with {n_tokens} tokens means {expected}")
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,))
