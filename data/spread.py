"""Validation from everywhere in the source, for text that lies in the order of its files or authors.

Both splits are written at once. Each time the validation falls behind what it should have by then, the next document
that a hash of its place chooses goes to it, whole. A document that is longer than a hundredth of all before it is
dealt out in pieces, so that one long text is spread too. What is missing at the end is taken from the end of training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.writer import VAL_FRACTION, ShardWriter, too_little_text

PIECE = 4096  # tokens, at least, of a document that is dealt out in pieces


class SpreadWriter:
    """Has the members of a ShardWriter that a preparation uses; where a token goes depends on those before it alone.

    `val_tokens`: of validation, exactly; None: a tenth, and at most `shard_tokens`. `tokens`: of training, None: all.
    `position`, `val`: how many tokens have been written and synced already, and how many of them to validation.
    """

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype, val_tokens: int | None, shard_tokens: int,
        tokens: int | None, position: int = 0, val: int = 0,
    ) -> None:  # fmt: skip
        self.val_tokens, self.tokens = val_tokens, tokens
        tenth = shard_tokens if tokens is None else max(1, tokens // (VAL_FRACTION - 1))
        self.most = val_tokens or min(shard_tokens, tenth)
        self.limit = None if tokens is None else tokens + self.most
        self.val = ShardWriter(folder, name, dtype, self.most, shard_tokens, val)
        self.train = ShardWriter(folder, name, dtype, 0, shard_tokens, position - val)

    @property
    def position(self) -> int:
        return self.val.position + self.train.position

    @property
    def state(self) -> dict[str, int]:
        return {"position": self.position, "val": self.val.position}

    def write_documents(self, tokens: np.ndarray, starts: Sequence[int], span: tuple[float, float]) -> int:
        """Append documents that begin at `starts` of `tokens`; the number of those that found room.

        `span`: how much of the source was read before them and after them, 0…1.
        """
        written = 0
        for start, end in pairwise([*starts, len(tokens)]):
            size = max(PIECE, self.position // 100)
            written += self.position != self.limit
            for at in range(start, end, size):
                self._write(tokens[at : min(at + size, end)], span[0] + (span[1] - span[0]) * at / len(tokens))
        return written

    def _write(self, piece: np.ndarray, fraction: float) -> None:
        room = len(piece) if self.tokens is None else self.tokens - self.train.position
        if self.tokens is not None:
            fraction = self.train.position / self.tokens
        due = self.most * fraction if self.val_tokens else min(self.most * fraction, self.position / VAL_FRACTION)
        behind = self.val.position < due and len(piece) <= self.position // VAL_FRACTION
        if room == 0 or (behind and hashlib.sha256(b"%d" % self.position).digest()[0] % 2):
            taken = min(len(piece), self.most - self.val.position)
            self.val.write(piece[:taken])
            piece = piece[taken:]
        self.train.write(piece[:room])

    def sync(self) -> None:
        self.val.sync()
        self.train.sync()

    def finish(self, hold_out: bool) -> list[Path]:
        """Complete the last shards; all shards, validation first. Raises TooLittleText if nothing is left to train on.

        Where training gives its end away, its .part file stays, to be removed by the caller, as in ShardWriter.
        """
        asked = min(self.most, self.position // VAL_FRACTION) if hold_out else self.most
        missing = max(0, asked - self.val.position)
        if hold_out and 10 * missing < asked:
            missing = 0  # about a tenth will do, and documents stay whole
        if asked == 0 or missing >= self.train.position:
            raise too_little_text(self.position, self.most)
        kept, end = self.train.split_end(missing)
        self.val.write(end)
        self.val.finish_shard()
        self.train.finish_shard(kept if missing else None)
        return [self.val.path(0), *map(self.train.path, range(1, self.train.shard + 1))]

    def close(self) -> None:
        self.val.close()
        self.train.close()
