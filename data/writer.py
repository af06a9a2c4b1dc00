"""A stream of tokens into shards of fixed size, continued after a kill at the exact token.

A shard grows as NAME.bin.part and takes its name when it is complete and on disk, so a file NAME.bin is never
half-written. The stream is a function of the source, so a shard found complete is passed over, not written again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import UserError, sync_folder
from data.shards import HEADER_BYTES, header, open_shard, write_shard

VAL_FRACTION = 10  # a tenth of a corpus that does not fill the validation shard


class TooLittleText(UserError):
    """The source has come to its end and has given nothing to train on."""


def too_little_text(tokens: int, val_tokens: int) -> TooLittleText:
    few = f"{tokens} tokens, too few for data.val_tokens={val_tokens} and training"
    return TooLittleText(f"the source has {few}: take a smaller data.val_tokens or more text")


class ShardWriter:
    """Shard 0, of `val_tokens` tokens, is validation; the others, of `shard_tokens` tokens each, are training.

    Without `val_tokens` there is no shard 0. `position`: how many tokens of the stream have been written and synced
    already; `limit`: how many it may have, None: any number.
    """

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype, val_tokens: int, shard_tokens: int, position: int = 0,
        limit: int | None = None,
    ) -> None:  # fmt: skip
        self.limit = limit
        self.folder, self.name, self.dtype = folder, name, dtype
        self.val_tokens, self.shard_tokens, self.position = val_tokens, shard_tokens, position
        first = 0 if val_tokens else 1
        after = 0 if position <= val_tokens else 1 + (position - val_tokens - 1) // shard_tokens
        self._begin_shard(max(first, after))

    def path(self, shard: int) -> Path:
        return self.folder / f"{self.name}_{'train' if shard else 'val'}_{shard:06d}.bin"

    def start(self, shard: int) -> int:
        """The place in the stream where a shard begins."""
        return self.val_tokens + (shard - 1) * self.shard_tokens if shard else 0

    @property
    def state(self) -> dict[str, int]:
        """What a writer that continues here must be given."""
        return {"position": self.position}

    def write_documents(self, tokens: np.ndarray, starts: Sequence[int], span: tuple[float, float]) -> int:
        """Append documents that begin at `starts` of `tokens`, up to the limit; the number of those that found room."""
        room = len(tokens) if self.limit is None else self.limit - self.position
        self.write(tokens[:room])
        return sum(start < room for start in starts)

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens [n] of the writer's dtype."""
        while len(tokens):
            room = self.start(self.shard + 1) - self.position
            if room == 0:  # closed only when a token follows: the last shard is finish()'s
                self._complete_shard()
                self._begin_shard(self.shard + 1)
                continue
            if self.file is not None:
                self.file.write(tokens[:room].data)
            self.position += len(tokens[:room])
            tokens = tokens[room:]

    def sync(self) -> None:
        """After this, a kill or a power cut loses nothing up to `position`."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def finish(self, hold_out: bool) -> list[Path]:
        """Complete the last shard; all shards, in order.

        If the stream ended inside shard 0, `hold_out` makes its first tenth validation and the rest training; the
        .part file stays then, to be removed by the caller. Raises TooLittleText if nothing is left for training.
        """
        if self.shard > 0:
            self.finish_shard()
        else:
            val = self.position // VAL_FRACTION if hold_out else 0
            if val == 0:
                raise too_little_text(self.position, self.val_tokens)
            tokens = self._open_shard_tokens()
            write_shard(self.path(0), tokens[:val], self.dtype)
            write_shard(self.path(1), tokens[val:], self.dtype)
        return [self.path(shard) for shard in range(max(1, self.shard) + 1)]

    def split_end(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """What the open shard holds without its last `tokens` tokens, of which one at least stays; and those."""
        if tokens == 0:
            return np.empty(0, self.dtype), np.empty(0, self.dtype)
        held = self._open_shard_tokens()
        at = max(1, len(held) - tokens)
        return held[:at], held[at:]

    def finish_shard(self, tokens: np.ndarray | None = None) -> None:
        """Complete the open shard, or write `tokens` in its place and leave the .part file to the caller."""
        if tokens is None:
            self._complete_shard()
        else:
            write_shard(self.path(self.shard), tokens, self.dtype)

    def _open_shard_tokens(self) -> np.ndarray:
        self.sync()
        shape = (self.position - self.start(self.shard),)
        return np.memmap(self._part(self.shard), self.dtype, "r", HEADER_BYTES, shape)

    def close(self) -> None:
        """Give the open file back, whatever state it is in."""
        if self.file is not None:
            self.file.close()

    def _part(self, shard: int) -> Path:
        return self.path(shard).with_suffix(".bin.part")

    def _begin_shard(self, shard: int) -> None:
        self.shard, self.file = shard, None
        part, written = self._part(shard), self.position - self.start(shard)
        if self.path(shard).exists() and not part.exists():
            return
        self.file = open(part, "r+b" if part.exists() else "w+b")  # noqa: SIM115 (lives as long as the shard)
        length = HEADER_BYTES + written * self.dtype.itemsize
        if written and os.fstat(self.file.fileno()).st_size < length:
            raise UserError(f"{part}: shorter than the progress file says; empty {self.folder} and start again")
        self.file.truncate(length)
        self.file.seek(length)

    def _complete_shard(self) -> None:
        final, count = self.path(self.shard), self.position - self.start(self.shard)
        if self.file is None:
            if len(open_shard(final)) != count:
                raise UserError(f"{final}: not of this preparation; empty {self.folder} and start again")
            return
        self.file.seek(0)
        self.file.write(header(count, self.dtype))
        self.sync()
        self.file.close()
        os.replace(self._part(self.shard), final)
        sync_folder(self.folder)
