"""A seeded permutation of 0…n−1 that is computed entry by entry, never stored."""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 6


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014). uint64 → uint64."""
    z = values + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permute(indices: np.ndarray, n: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """The images of `indices` (each in 0…n−1) under the permutation of n elements that `seed` names: int64.

    A Feistel network with additions (Black & Rogaway 2002, method 3) on pairs (left, right) of a·b ≥ n values,
    a, b ≈ √n. The few entries that land beyond n − 1 go through it again (cycle walking).
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)  # documented never to change
    out = np.asarray(indices).astype(np.uint64)
    walking = np.arange(out.size)
    with np.errstate(over="ignore"):
        while walking.size:
            left, right = np.divmod(out[walking], np.uint64(b))
            for even, odd in keys.reshape(-1, 2):
                left = (left + _hash(right, even) % np.uint64(a)) % np.uint64(a)
                right = (right + _hash(left, odd) % np.uint64(b)) % np.uint64(b)
            out[walking] = left * np.uint64(b) + right
            walking = walking[out[walking] >= n]
    return out.astype(np.int64)
