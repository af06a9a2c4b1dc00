"""A stream of tokens into shards of fixed size, continued after a kill at the exact token.

A shard grows as NAME.bin.part and takes its name when it is complete and on disk, so a file NAME.bin is never
half-written. The stream is a function of the source, so a shard found complete is passed over, not written again.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from common import UserError, sync_folder
from data.shards import HEADER_BYTES, header, open_shard, write_shard

VAL_FRACTION = 10  # a tenth of a corpus that does not fill the validation shard


class TooLittleText(UserError):
    """The source has come to its end and has given nothing to train on."""


class ShardWriter:
    """Shard 0, of `val_tokens` tokens, is validation; the others, of `shard_tokens` tokens each, are training.

    `position`: how many tokens of the stream have been written and synced already.
    """

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype, val_tokens: int, shard_tokens: int, position: int = 0
    ) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self.val_tokens, self.shard_tokens, self.position = val_tokens, shard_tokens, position
        self._begin_shard(0 if position <= val_tokens else 1 + (position - val_tokens - 1) // shard_tokens)

    def path(self, shard: int) -> Path:
        return self.folder / f"{self.name}_{'train' if shard else 'val'}_{shard:06d}.bin"

    def start(self, shard: int) -> int:
        """The place in the stream where a shard begins."""
        return self.val_tokens + (shard - 1) * self.shard_tokens if shard else 0

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
            self._complete_shard()
        else:
            val = self.position // VAL_FRACTION if hold_out else 0
            if val == 0:
                few = f"{self.position} tokens, too few for data.val_tokens={self.val_tokens} and training"
                raise TooLittleText(f"the source has {few}: take a smaller data.val_tokens or more text")
            self.sync()
            tokens = np.memmap(self._part(0), self.dtype, "r", HEADER_BYTES, (self.position,))
            write_shard(self.path(0), tokens[:val], self.dtype)
            write_shard(self.path(1), tokens[val:], self.dtype)
        return [self.path(shard) for shard in range(max(1, self.shard) + 1)]

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
