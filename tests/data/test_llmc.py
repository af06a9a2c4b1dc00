"""data.order=llmc against llm.c's loader, written out: eight processes, each with its own twister, file and place."""

import numpy as np
import pytest

from data.loader import Loader
from data.shards import write_shard
from tests.data.test_loader import global_batch, ranks


class Twister:
    """MT19937 (Matsumoto and Nishimura 1998), seeded as in their init_genrand."""

    def __init__(self, seed):
        self.state, self.next = [seed], 624
        for j in range(1, 624):
            last = self.state[-1]
            self.state.append((1812433253 * (last ^ last >> 30) + j) % 2**32)

    def draw(self):
        if self.next == 624:
            for j in range(624):
                y = self.state[j] & 0x80000000 | self.state[(j + 1) % 624] & 0x7FFFFFFF
                self.state[j] = self.state[(j + 397) % 624] ^ y >> 1 ^ (0x9908B0DF if y % 2 else 0)
            self.next = 0
        y = self.state[self.next]
        self.next += 1
        y ^= y >> 11
        y ^= y << 7 & 0x9D2C5680
        y ^= y << 15 & 0xEFC60000
        return y ^ y >> 18

    def shuffle(self, items):
        for i in reversed(range(1, len(items))):
            j = self.draw() % (i + 1)
            items[i], items[j] = items[j], items[i]


class Process:
    """One GPU's part of every batch: ``take`` returns the next tokens of ``rows`` sequences."""

    def __init__(self, rank, files, rows, length):
        self.rank, self.files, self.tokens = rank, files, rows * length
        self.twister, self.order = Twister(42 + rank), list(range(len(files)))
        self.begin()

    def begin(self):
        self.twister.shuffle(self.order)
        self.number = 0
        self.open()

    def open(self):
        self.file = self.files[self.order[self.number]]
        self.left = list(range((len(self.file) - 1) // (8 * self.tokens)))
        self.twister.shuffle(self.left)

    def take(self):
        if not self.left:
            self.number += 1
            self.begin() if self.number == len(self.files) else self.open()
        start = self.left.pop(0) * 8 * self.tokens + self.rank * self.tokens
        return self.file[start : start + self.tokens + 1]


def test_the_twister_is_llm_cs():
    """The numbers that its rand.h gives as an example."""
    twister = Twister(137)
    assert [twister.draw() for _ in range(3)] == [4053805790, 2173880614, 380293709]


@pytest.mark.parametrize("sizes", [[900, 1300, 700, 2100, 1001], [4000, 1900], [400]])
def test_it_is_the_order_of_llm_c(tmp_path, sizes):
    """Over three epochs and on any number of ranks; shards of any size."""
    rows, length = 2, 8
    files = [np.arange(size) + 1000 * i for i, size in enumerate(sizes)]
    for i, tokens in enumerate(files):
        write_shard(tmp_path / f"{i}.bin", tokens)
    paths = sorted(tmp_path.iterdir())
    settings = dict(seq_len=length, batch_sequences=8 * rows, order="llmc")
    processes = [Process(rank, files, rows, length) for rank in range(8)]
    loaders = {(n, micro): ranks(paths, n, micro, **settings) for n, micro in [(1, 4), (2, None), (8, 1)]}
    for step in range(3 * sum((size - 1) // (8 * rows * length) for size in sizes)):
        taken = [process.take() for process in processes]
        expected = [part[i * length : (i + 1) * length + 1] for part in taken for i in range(rows)]
        for loader in loaders.values():
            assert np.array_equal(global_batch(loader, step), expected)
    resumed = global_batch([Loader(paths, **settings)], step)
    assert np.array_equal(resumed, expected)
    other = global_batch([Loader(paths, **settings, seed=1)], step)
    assert len(sizes) == 1 or not np.array_equal(other, expected)


def test_a_batch_that_is_no_multiple_of_eight_is_an_error(tmp_path, mistake):
    write_shard(tmp_path / "0.bin", np.arange(999))
    with mistake("data.order=llmc", "12 sequences", "64", "train.batch_tokens"):
        Loader([tmp_path / "0.bin"], seq_len=8, batch_sequences=12, order="llmc")
