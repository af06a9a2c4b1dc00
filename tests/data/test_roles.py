"""Which shards are for training and which for validation: the end of the name says it, and only the end."""

import os
from pathlib import Path

import numpy as np
import pytest

from data import manifest
from data.build import build
from data.shards import split_of, write_shard
from data.split import open_split
from tests.data.test_split import config_of


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("fineweb_train_000001.bin", "train"),
        ("fineweb_val_000000.bin", "val"),
        ("c4_train_train_000001.bin", "train"),
        ("c4_train_val_000000.bin", "val"),
        ("my_val_set_train_000001.bin", "train"),
        ("my_val_set_val_000000.bin", "val"),
        ("tiny_shakespeare_train.bin", "train"),
        ("TinyStories_val.bin", "val"),
        ("train.bin", "train"),
        ("retrain_000001.bin", None),
        ("x_val_000000.bin.part", None),
        ("x_train_000001_of_8.bin", None),
        ("x_validation_000001.bin", None),
        ("x_train_val.bin", "val"),
        ("x_val_train_1.bin", "train"),
        ("sub/x_val_000000.bin", "val"),
        ("X_TRAIN_000001.BIN", "train"),
        ("x_train_000001xbin", None),
        ("x_train_000001.bin\n", None),
    ],
)
def test_the_end_of_the_name_decides(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("name", ["c4_train", "my_val_set", "a_val_b_train_c", "_train_", "val", "x_train_000001"])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_no_name_puts_validation_into_training(rows, local, name, with_manifest):
    config = local(rows[:300], shard_tokens=40_000)
    config.name = name
    content = build(config)
    if not with_manifest:
        (config.folder / manifest.NAME).unlink()
    split = open_split(config)
    assert [file.name for file in split.val] == [f"{name}_val_000000.bin"]
    assert [file.name for file in split.train] == [f"{name}_train_{i:06d}.bin" for i in range(1, len(split.train) + 1)]
    assert len(split.train) > 1 and not set(split.train) & set(split.val)
    assert content["tokens"]["val"] == 40_000 and content["tokens"]["train"] > 40_000


def test_shards_come_in_the_order_of_their_numbers(tmp_path):
    names = ["x_train_2.bin", "x_train_10.bin", "x_train_000011.bin", "X_TRAIN_3.BIN", "x_val_0.bin"]
    for tokens, name in enumerate(names):
        write_shard(tmp_path / name, np.arange(90 + tokens))
    split = open_split(config_of("shards", dir=str(tmp_path)))
    assert [file.name for file in split.train] == ["X_TRAIN_3.BIN", *names[:3]]


def test_llm_c_s_own_names_open(tmp_path):
    for name, tokens in (("tiny_shakespeare_train.bin", 99), ("tiny_shakespeare_val.bin", 98)):
        write_shard(tmp_path / name, np.arange(tokens))
    (tmp_path / "gpt2_124M.bin").write_bytes(b"weights, not tokens")
    split = open_split(config_of("shards", dir=str(tmp_path)))
    assert [file.name for file in (*split.train, *split.val)] == sorted(f.name for f in tmp_path.glob("tiny*"))


def test_a_shard_without_a_role_is_named(tmp_path, mistake):
    for name in ("x_train_000001.bin", "x_val_000000.bin", "x_train_000002_of_8.bin"):
        write_shard(tmp_path / name, np.arange(99))
    with mistake(str(tmp_path / "x_train_000002_of_8.bin"), "NAME_train_000001.bin", "NAME_val_000000.bin"):
        open_split(config_of("shards", dir=str(tmp_path)))


def test_the_manifest_decides_where_there_is_one(rows, local):
    """Also where it was written before it named each shard's split."""
    config = local(rows[:300], shard_tokens=40_000)
    content = build(config)
    assert [entry["split"] for entry in content["shards"]] == ["val", *["train"] * (len(content["shards"]) - 1)]
    files = [config.folder / entry["file"] for entry in content["shards"]]
    content["shards"][2]["split"] = "val"
    content["checksum"] = manifest._checksum(content)
    manifest.write_json(config.folder / manifest.NAME, content)
    assert open_split(config).val == [files[0], files[2]]
    for entry in content["shards"]:
        del entry["split"]
    content["checksum"] = manifest._checksum(content)
    manifest.write_json(config.folder / manifest.NAME, content)
    assert (open_split(config).val, open_split(config).train) == (files[:1], files[1:])


def test_endings_count_in_any_case(tmp_path):
    for i, name in enumerate(("x_train_000001.bin", "X_TRAIN_000002.BIN", "x_Val_000000.bin")):
        write_shard(tmp_path / name, np.arange(99) + i)
    split = open_split(config_of("shards", dir=str(tmp_path)))
    assert {file.name for file in split.train} == {"x_train_000001.bin", "X_TRAIN_000002.BIN"} and len(split.val) == 1


@pytest.mark.parametrize("way", [Path.symlink_to, Path.hardlink_to, lambda new, old: new.write_bytes(old.read_bytes())])
@pytest.mark.parametrize(("copy", "reason"), [("x_val_000000.bin", "never for both"), ("x_train_000002.bin", "twice")])
def test_a_file_is_read_for_one_purpose_and_once(tmp_path, mistake, way, copy, reason):
    write_shard(tmp_path / "x_train_000001.bin", np.arange(99))
    write_shard(tmp_path / "x_val_000009.bin", np.arange(98))
    way(tmp_path / copy, tmp_path / "x_train_000001.bin")
    with mistake(str(tmp_path / copy), str(tmp_path / "x_train_000001.bin"), reason):
        open_split(config_of("shards", dir=str(tmp_path)))


def test_hidden_files_are_no_shards(tmp_path):
    for tokens, name in enumerate(("x_train_000001.bin", "x_val_000000.bin", ".x_train_000002.bin")):
        write_shard(tmp_path / name, np.arange(90 + tokens))
    (tmp_path / "._x_train_000001.bin").write_bytes(b"what a Mac leaves")
    assert [file.name for file in open_split(config_of("shards", dir=str(tmp_path))).train] == ["x_train_000001.bin"]


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, mistake):
    write_shard(tmp_path / "x_val_000000.bin", np.arange(99))
    os.mkfifo(tmp_path / "x_train_000001.bin")
    with mistake(str(tmp_path / "x_train_000001.bin"), "FIFO"):
        open_split(config_of("shards", dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"split": "Train"}, "train or val"),
        ({"file": "../x_train_000001.bin"}, "no file of this folder"),
        ({"file": "x\0.bin"}, "no file of this folder"),
        ({"file": None}, "lacks one of file"),
        ({"tokens": "99"}, "lacks one of file, tokens"),
        ({"file": "local_val_000000.bin"}, "twice"),
    ],
)
def test_a_manifest_that_says_something_else_is_one_line(rows, local, mistake, change, reason):
    """Its checksum is right: somebody's program has written it."""
    config = local(rows[:20])
    content = build(config)
    content["shards"][1] |= change
    content["checksum"] = manifest._checksum(content)
    manifest.write_json(config.folder / manifest.NAME, content)
    with mistake(str(config.folder / manifest.NAME), reason):
        open_split(config)


@pytest.mark.parametrize("name", ["", " ", "a/b", "a\nb", "a\0b", "x" * 300])
def test_a_name_that_names_no_files_is_one_line(mistake, name):
    with mistake(f"data.name={name!r}", "a plain word"):
        config_of("local", name=name, dir="x").check()
