"""Which shards are for training and which for validation: the end of the name says it, and only the end."""

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


def test_llm_c_s_own_names_open(tmp_path):
    for name in ("tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin"):
        write_shard(tmp_path / name, np.arange(99))
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
