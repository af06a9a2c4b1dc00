"""llm.c's shuffled order (karpathy/llm.c, llmc/dataloader.h and llmc/rand.h) on eight GPUs with one micro-batch each.

Every GPU has a Mersenne twister of its own, seeded with 42 + its number.  For each epoch it permutes the shards, from
the order of the epoch before, and for each shard its batches: those of all eight GPUs, of which it reads its own
eighth.  So the eighths of a step come from different shards.
"""

from __future__ import annotations

import numpy as np

RANKS = 8  # llm.c's, whatever the number of ours


class LLMCOrder:
    """
    Args:
        batches: number of whole batches of every shard, int64.
        seed: 0 is llm.c's; each other has twisters of its own.
    """

    def __init__(self, batches: np.ndarray, seed: int = 0) -> None:
        self.batches = batches
        self.first = np.cumsum(self.batches) - self.batches  # batches before each shard
        # RandomState's stream is frozen, and its seeding and that of torch and llm.c are the same.
        self.twisters = [np.random.RandomState((42 + rank + RANKS * seed) % 2**32) for rank in range(RANKS)]
        self.shards = [np.arange(len(self.batches)) for _ in range(RANKS)]
        self.epochs: list[np.ndarray] = []

    def at(self, step: int) -> np.ndarray:
        """The batch, counted over all shards, of which each of the eight reads its part: int64 [8]."""
        epoch, place = divmod(step, int(self.batches.sum()))
        while len(self.epochs) <= epoch:
            self.epochs.append(np.stack([self._next_epoch(rank) for rank in range(RANKS)], axis=1))
        row: np.ndarray = self.epochs[epoch][place]
        return row

    def _next_epoch(self, rank: int) -> np.ndarray:
        twister, shards = self.twisters[rank], self.shards[rank]
        permute_in_place(shards, twister)
        parts = []
        for shard in shards:
            inside = np.arange(self.batches[shard])
            permute_in_place(inside, twister)
            parts.append(self.first[shard] + inside)
        return np.concatenate(parts)


def permute_in_place(values: np.ndarray, twister: np.random.RandomState) -> None:
    """Fisher and Yates' shuffle from the end, by 32 bits a place."""
    last = len(values) - 1
    draws = twister.randint(0, 2**32, size=max(last, 0), dtype=np.uint32).astype(np.int64)
    for i, draw in zip(range(last, 0, -1), draws, strict=True):
        j = draw % (i + 1)
        values[i], values[j] = values[j], values[i]
