"""The .bin format: bytes as llm.c writes them, round trips, and errors that name the file and what is wrong."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from data.shards import open_shard, write_shard


def test_bytes_are_llm_c_s(tmp_path):
    write_shard(tmp_path / "a.bin", [50256, 1, 65535])
    assert (tmp_path / "a.bin").read_bytes() == (
        struct.pack("<3i", 20240520, 1, 3) + bytes(253 * 4) + struct.pack("<3H", 50256, 1, 65535)
    )
    write_shard(tmp_path / "b.bin", [128000, 7], np.uint32)
    assert (tmp_path / "b.bin").read_bytes() == (
        struct.pack("<3i", 20240801, 7, 2) + bytes(253 * 4) + struct.pack("<2I", 128000, 7)
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=50), st.sampled_from([np.uint16, np.uint32]))
def test_round_trip(tmp_path_factory, tokens, dtype):
    path = tmp_path_factory.mktemp("shard") / "a.bin"
    write_shard(path, np.array(tokens), dtype)
    assert open_shard(path).tolist() == tokens and open_shard(path).dtype == dtype


def _patched(at: int, value: int) -> bytes:
    fields = [20240520, 1, 4, *[0] * 253]
    fields[at] = value
    return struct.pack("<256i", *fields) + bytes(8)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ["0 bytes", "header"]),
        (bytes(1023), ["1023 bytes", "header"]),
        (_patched(0, 20240521), ["magic 20240521 version 1", "20240520 version 1"]),
        (_patched(1, 2), ["magic 20240520 version 2", "20240520 version 1"]),
        (_patched(1, 7), ["magic 20240520 version 7", "20240801 version 7"]),
        (_patched(2, 5), ["5 tokens", "1034"]),
        (_patched(2, 0), ["0 tokens"]),
        (_patched(2, -4), ["-4 tokens"]),
        (_patched(2, 4)[:-1], ["1031 bytes", "4 tokens", "1032"]),
        (_patched(2, 4) + b"x", ["1033 bytes", "4 tokens", "1032"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, mistake, content, said):
    path = tmp_path / "broken.bin"
    path.write_bytes(content)
    with mistake(str(path), *said):
        open_shard(path)


def test_missing_file_and_folder_are_named(tmp_path, mistake):
    with mistake(str(tmp_path / "none.bin"), "no such file"):
        open_shard(tmp_path / "none.bin")
    with mistake(str(tmp_path), "cannot be read"):
        open_shard(tmp_path)


@pytest.mark.parametrize("tokens", [[65536], [-1], [1.5], [[1]]])
def test_tokens_that_do_not_fit_leave_nothing(tmp_path, tokens):
    with pytest.raises(UserError):
        write_shard(tmp_path / "a.bin", tokens)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.bin", [1, 2])
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.bin", [3])
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"] and open_shard(tmp_path / "a.bin").tolist() == [1, 2]


def test_a_hundred_shards_open_within_a_second(tmp_path):
    import time

    for i in range(100):
        write_shard(tmp_path / f"{i}.bin", np.zeros(10_000, np.uint16))
    start = time.perf_counter()
    opened = [open_shard(tmp_path / f"{i}.bin") for i in range(100)]
    assert time.perf_counter() - start < 1 and len(opened) == 100
