"""A run reads the text it asks for: what a folder was prepared from is compared with what the settings name."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from data import manifest
from data.build import build
from data.config import DataConfig
from data.shards import HEADER_BYTES, open_shard
from data.sources.local import LocalText
from data.split import open_split
from tests.data.test_split import config_of


@pytest.fixture
def prepared(tmp_path):
    """tmp_path/A and B, and a config whose folder was prepared from A."""
    for name in "AB":
        (tmp_path / name).mkdir()
        for i in range(8):
            text = "".join(json.dumps({"text": f"{name} {i} {j} " * 20}) + "\n" for j in range(9))
            (tmp_path / name / f"{i}.jsonl").write_text(text)
    keys = {"dir": str(tmp_path / "out"), "tokenizer": "byte"}
    config = config_of("local", source=str(tmp_path / "A"), **keys)
    build(config)
    return config


def test_the_same_source_opens_and_so_does_none(prepared, tmp_path):
    expected = open_split(prepared).fingerprint
    for source in ("", f"{tmp_path}/B/../A", f"{tmp_path}/A/"):
        assert open_split(config_of("local", source=source, dir=prepared.dir, tokenizer="byte")).fingerprint == expected
    assert open_split(config_of("shards", dir=prepared.dir)).fingerprint == expected


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"source": "B"}, "from A"),
        ({"source": "missing"}, "from A"),
        ({"source": "A/0.jsonl"}, "from A"),
        ({"source": "hub:some/text"}, "from A"),
        ({"source": "hub:some/text", "pretokenized": "some/shards"}, "from A"),
        ({"source": "sample"}, "from A"),
        ({"source": {"_target_": "examples.squares_source.Squares"}}, "from A"),
        ({"tokens": 1000}, "with None"),
        ({"val_tokens": 7}, "with None"),
    ],
)
def test_another_source_is_named(prepared, tmp_path, monkeypatch, mistake, keys, found):
    monkeypatch.chdir(tmp_path)
    (key, value), *_ = keys.items()
    with mistake(
        f"data.{key}={value}",
        str(prepared.folder),
        f"prepared {found}",
        f"data=shards data.dir={prepared.dir} data.order=shuffled",
    ):
        open_split(config_of("local", **({"source": "A", "dir": prepared.dir, "tokenizer": "byte"} | keys)))


def add(folder: Path) -> None:
    (folder / "more.txt").write_text("more")


def edit(folder: Path) -> None:
    """As many bytes as before."""
    (folder / "3.jsonl").write_text((folder / "3.jsonl").read_text().replace("A 3 5", "A 3 6"))


def remove(folder: Path) -> None:
    (folder / "0.jsonl").unlink()


def rename(folder: Path) -> None:
    (folder / "0.jsonl").rename(folder / "9.jsonl")


def replace(folder: Path) -> None:
    """Another folder of the same name."""
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "B", folder)


@pytest.mark.parametrize("change", [add, edit, remove, rename, replace])
def test_a_changed_source_is_named(prepared, tmp_path, mistake, change):
    change(tmp_path / "A")
    with mistake(f"data.source={prepared.source}", str(prepared.folder), "other text called A", "data=shards"):
        open_split(prepared)
    with mistake(f"data.dir={prepared.folder}", "another content", "choose another"):
        build(prepared)


def test_a_copy_of_the_source_and_no_source_at_all_open(prepared, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "A").rename(tmp_path / "elsewhere" / "A")
    assert open_split(prepared).train, "what is not at hand is compared by name"
    prepared.source = str(tmp_path / "elsewhere" / "A")
    assert open_split(prepared).train and build(prepared)


def test_a_source_of_one_s_own_with_other_settings_is_named(tmp_path, mistake):
    source = {"_target_": "examples.squares_source.Squares", "count": 300}
    config = DataConfig("squares", source, dir=str(tmp_path), tokenizer="byte")
    build(config)
    assert open_split(config).train
    config.source = source | {"count": 200}
    with mistake("data.source=", "'count': 200", "other text called squares"):
        open_split(config)
    config.source = {"_target_": "not.installed.here.Squares"}
    assert open_split(config).train


def test_folders_of_before_open(prepared):
    """Their identity of local text was made of names and sizes alone."""
    content = manifest.read_manifest(prepared.folder)
    for settings in ({}, content["settings"] | {"content": "0" * 64}):
        files = [prepared.folder / entry["file"] for entry in content["shards"]]
        manifest.write_manifest(prepared.folder, content | {"settings": settings}, {}, files)
        assert open_split(prepared).train
        if not settings:
            assert open_split(dataclasses.replace(prepared, tokens=100)).train


def test_another_validation_is_not_what_was_prepared(prepared, mistake):
    with mistake("data.validation=first", "with spread", "data=shards"):
        open_split(dataclasses.replace(prepared, validation="first"))
    assert open_split(config_of("shards", dir=prepared.dir, validation="spread")).train, "takes what is there"


def test_hub_commits_are_compared(prepared, mistake):
    content = manifest.read_manifest(prepared.folder) | {"source": "hub:a/b", "revision": "0" * 40}
    files = [prepared.folder / entry["file"] for entry in content["shards"]]
    manifest.write_manifest(prepared.folder, content, {}, files)
    config = config_of("local", source="hub:a/b", dir=prepared.dir, tokenizer="byte")
    for revision in (None, "main", "0" * 40):
        config.revision = revision
        assert open_split(config).train
    config.revision = "1" * 40
    with mistake("data.revision=1111", "from commit 0000", "data=shards"):
        open_split(config)
    config.revision, config.source, config.pretokenized = None, "hub:x/y", "a/b"
    assert open_split(config).train, "ready-made shards of that text"


def test_text_replaced_anywhere_changes_the_fingerprint(prepared, tmp_path):
    before = open_split(prepared).fingerprint
    file = open_split(prepared).train[0]
    assert len(open_shard(file)) > 5000
    with open(file, "r+b") as opened:
        opened.seek(HEADER_BYTES + 2 * 4500)
        opened.write(b"\x01\x00")
    content = manifest.read_manifest(prepared.folder)
    files = [prepared.folder / entry["file"] for entry in content["shards"]]
    manifest.write_manifest(prepared.folder, content, content["documents"], files)
    assert open_split(prepared).fingerprint != before


def test_the_identity_is_the_text_s(tmp_path):
    for name in "ab":
        (tmp_path / name / "t").mkdir(parents=True)
        (tmp_path / name / "t" / "x.txt").write_text("text")
    one, two = (LocalText(str(tmp_path / name / "t")) for name in "ab")
    assert one.identity == two.identity and one.identity.startswith("sha256:")
