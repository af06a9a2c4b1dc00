"""A seeded permutation of 0…n−1 that is computed entry by entry, never stored."""

from __future__ import annotations

import numpy as np

ROUNDS = 6


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014), a good 64-bit hash. uint64 → uint64."""
    z = values + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permute(indices: np.ndarray, n: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """The images of `indices` (each in 0…n−1) under the permutation of n elements that `seed` names: int64.

    A Feistel network (Luby & Rackoff 1988) permutes the smallest 4^k ≥ n; entries that land outside are sent
    through it again until they land inside (cycle walking, Black & Rogaway 2002): fewer than 4 passes on average.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)  # documented never to change
    out = np.asarray(indices).astype(np.uint64)
    walking = np.arange(out.size)
    with np.errstate(over="ignore"):
        while walking.size:
            values = out[walking]
            left, right = values >> shift, values & mask
            for key in keys:
                left, right = right, left ^ (_mix(right, key) & mask)
            out[walking] = (left << shift) | right
            walking = walking[out[walking] >= n]
    return out.astype(np.int64)
