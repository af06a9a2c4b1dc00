"""Validation of one's own text comes from all of it, in the same place after every restart; nothing is lost."""

import json
import os
from collections import Counter
from functools import partial

import numpy as np
import pytest

from data import build as building
from data import manifest
from data.build import build
from data.shards import open_shard
from data.split import open_split
from tests.data.test_kill import contents, stopped_at_every_commit
from tests.data.test_split import config_of

AUTHORS = "abcde"


@pytest.fixture
def config(tmp_path):
    """config(documents by file, **keys): data=local from files of these lengths, each of one letter."""

    def make(lengths: dict[str, list[int]], **keys):
        (tmp_path / "text").mkdir(exist_ok=True)
        for name, each in lengths.items():
            lines = "".join(json.dumps({"text": name * length}) + "\n" for length in each)
            (tmp_path / "text" / f"{name}.jsonl").write_text(lines)
        defaults = {"source": str(tmp_path / "text"), "dir": str(tmp_path / "out"), "tokenizer": "byte", "workers": 2}
        return config_of("local", **(defaults | keys))

    return make


def lengths(seed: int = 0) -> dict[str, list[int]]:
    drawn = np.random.default_rng(seed)
    return {author: drawn.integers(100, 2000, 200).tolist() for author in AUTHORS}


def read(config) -> tuple[np.ndarray, np.ndarray]:
    split = open_split(config)
    val, train = (np.concatenate([open_shard(file) for file in files]) for files in (split.val, split.train))
    return val, train


def share(tokens: np.ndarray, letter: str) -> float:
    return float((tokens == ord(letter)).mean())


def documents(tokens: np.ndarray) -> Counter:
    """How often each document, (letter, length), comes."""
    parts = np.split(tokens, np.flatnonzero(tokens == 256))[1:]
    return Counter((chr(part[-1]), len(part) - 1) for part in parts)


@pytest.mark.parametrize("keys", [{}, {"shard_tokens": 100_000}, {"val_tokens": 60_000}, {"val_tokens": 300_000}])
def test_every_author_is_validated_in_proportion(config, keys):
    made = config(lengths(), **keys)
    content = build(made)
    val, train = read(made)
    total = sum(1 + length for each in lengths().values() for length in each)
    assert len(val) + len(train) == total and manifest.verify_folder(made.folder) == []
    wanted = keys.get("val_tokens") or min(total // 10, made.shard_tokens)
    assert len(val) == wanted or (not keys and abs(len(val) - wanted) < wanted / 10)
    for author in AUTHORS:
        of_all = sum(lengths()[author]) / total
        assert abs(share(val, author) - of_all) < 0.08 and abs(share(train, author) - of_all) < 0.08
    assert content["settings"]["validation"] == "spread" and content["documents"]["written"] == 1000


def test_documents_stay_whole_and_come_once(config):
    made = config(lengths())
    build(made)
    val, train = read(made)
    assert documents(val) + documents(train) == Counter((a, n) for a, each in lengths().items() for n in each)


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_pattern_of_the_source_is_not_validation_s(config, tmp_path, first):
    made = config({})
    texts = [("a" if (n % 2 == 0) == (first == "a") else "b") * 999 for n in range(2000)]
    (tmp_path / "text" / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build(made)
    assert 0.3 < share(read(made)[0], "a") < 0.7


def test_few_long_texts_are_spread_too(config):
    made = config({author: [100_000] for author in AUTHORS})
    build(made)
    val, train = read(made)
    assert 50_000 <= len(val) < 55_000 and all(share(val, author) > 0.05 for author in AUTHORS)
    assert len(val) + len(train) == 500_005 and documents(val) + documents(train)


@pytest.mark.parametrize("text", ["txt", "jsonl"])
def test_one_long_text_is_validated_in_several_places(config, tmp_path, text):
    made = config({})
    words = " ".join(f"{n:06d}" for n in range(100_000))
    (tmp_path / "text" / f"x.{text}").write_text(words if text == "txt" else json.dumps({"text": words}))
    build(made)
    val, train = read(made)
    assert 65_000 <= len(val) < 75_000 and len(val) + len(train) == len(words) + 1
    places = sorted(int(word) for word in bytes(val[val < 256].astype(np.uint8)).decode().split() if len(word) == 6)
    assert sum(b - a > 100 for a, b in zip(places, places[1:], strict=False)) >= 5
    assert len(set(places)) == len(places)


def test_too_little_text_is_named_and_little_is_enough(config, mistake):
    with mistake("6 tokens", "data.val_tokens=100", "smaller data.val_tokens"):
        build(config({"x": [5]}, val_tokens=100))
    assert build(config({"x": [5]}, val_tokens=2))["tokens"] == {"val": 2, "train": 4}


@pytest.mark.parametrize(("tokens", "val_tokens"), [(50_000, 20_000), (50_000, 1), (1, 50_000), (100_000, None)])
def test_tokens_cut_exactly(config, tokens, val_tokens):
    made = config(lengths(), tokens=tokens, val_tokens=val_tokens, shard_tokens=30_000)
    content = build(made)
    assert content["tokens"] == {"train": tokens, "val": val_tokens or tokens // 9}
    assert content["documents"]["written"] == sum(documents(np.concatenate(read(made))).values()) < 1000


def test_first_stays_first_and_another_choice_needs_another_folder(config, mistake):
    made = config(lengths(), validation="first")
    content = build(made)
    val, _ = read(made)
    assert set(val.tolist()) == {256, ord("a")} and "validation" not in content["settings"]
    made.validation = "spread"
    with mistake(f"data.dir={made.folder}", "another validation (first, now spread)", "choose another"):
        build(made)


@pytest.mark.parametrize("shard_tokens", [60_000, 10_000_000])
def test_stopping_at_every_commit(config, monkeypatch, shard_tokens):
    monkeypatch.setattr(building, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    made = config({author: each[:60] for author, each in lengths().items()}, shard_tokens=shard_tokens)
    build(made)
    expected = contents(made.folder)
    for number in stopped_at_every_commit(made, monkeypatch):
        build(made)
        assert contents(made.folder) == expected, f"stopped at commit {number}"
    assert number > 10


def test_a_stop_at_every_batch_changes_nothing(config, monkeypatch):
    """With too long a time between saves for anything to be on disk but what the stop leaves."""
    monkeypatch.setattr(building, "CHECKPOINT_SECONDS", 0.0)
    made = config(lengths(), shard_tokens=50_000, workers=1)
    build(made)
    expected = contents(made.folder)
    made.dir = f"{made.dir}x"

    def stop(*_):
        raise KeyboardInterrupt

    for number in range(100):
        try:
            build(made, partial(stop))
            break
        except KeyboardInterrupt:
            assert number < 99
    assert contents(made.folder) == expected and number > 2


def test_the_order_of_local_text_depends_on_the_seed():
    assert (config_of("local").order, config_of("local").validation) == ("shuffled", "spread")
    assert all(config_of(name).validation == "first" for name in ("fineweb", "finewebedu", "sample"))
    assert all(config_of(name).order == "sequential" for name in ("fineweb", "finewebedu"))
