"""The hub, played by local files: `datasets` really streams them, only the address is replaced."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import build as building
from data import manifest
from data.build import build, prepare
from data.config import DataConfig
from data.shards import open_shard, write_shard
from data.sources.hub import HubText
from data.split import open_split

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FINEWEB = {"name": "fineweb", "source": "hub:HuggingFaceFW/fineweb:sample-10BT", "order": "sequential"}


@pytest.fixture
def hub(rows, tmp_path, monkeypatch):
    """FineWeb's sample in three parquet files; returns the calls that `datasets` got."""
    files, calls, real = [], [], datasets.load_dataset
    for i in range(3):
        files.append(str(tmp_path / f"{i}.parquet"))
        pq.write_table(pa.Table.from_pylist(rows[i * 500 : (i + 1) * 500]), files[-1], row_group_size=200)

    def load(repository, **keys):
        calls.append((repository, keys))
        return real("parquet", data_files=files, split=keys["split"], streaming=keys["streaming"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    newest_commit(monkeypatch, COMMIT)
    return calls


def newest_commit(monkeypatch, commit: str) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, revision: SimpleNamespace(sha=commit))


def everything(folder: Path) -> list[int]:
    split = open_split(DataConfig(**FINEWEB, dir=str(folder)))
    return np.concatenate([open_shard(file) for file in [*split.val, *split.train]]).tolist()


def test_raw_text_is_streamed_and_tokenized(hub, rows, gpt2, tmp_path):
    content = build(DataConfig(**FINEWEB, dir=str(tmp_path / "out"), tokenizer="gpt2", shard_tokens=50_000))
    expected = [t for row in rows[:1500] for t in [50256, *gpt2.encode_ordinary(row["text"])]]
    assert everything(tmp_path / "out") == expected
    assert hub == [("HuggingFaceFW/fineweb",
                    {"name": "sample-10BT", "split": "train", "streaming": True, "revision": COMMIT})]  # fmt: skip
    assert (content["source"], content["revision"]) == (FINEWEB["source"], COMMIT)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.bin"))[-1] == "fineweb_val_000000.bin"


def test_a_stream_continues_where_its_cursor_says(hub):
    whole = list(HubText(FINEWEB["source"], COMMIT).batches(None))
    assert sum(len(batch.documents) for batch in whole) == 1500
    for at in (0, 1, len(whole) // 2):
        rest = list(HubText(FINEWEB["source"], COMMIT).batches(json.loads(json.dumps(whole[at].cursor))))
        assert [batch.documents for batch in rest] == [batch.documents for batch in whole[at + 1 :]]
        again = list(HubText(FINEWEB["source"], COMMIT).batches(json.loads(json.dumps(rest[0].cursor))))
        assert [batch.documents for batch in again] == [batch.documents for batch in whole[at + 2 :]]


def test_a_failing_network_loses_nothing(hub, tmp_path, monkeypatch, mistake):
    """The connection breaks after the second batch; the same command continues at the commit it began with."""
    monkeypatch.setattr(building, "CHECKPOINT_SECONDS", 0.0)
    keys = {**FINEWEB, "tokenizer": "byte", "shard_tokens": 50_000, "workers": 1}
    build(DataConfig(**keys, dir=str(tmp_path / "undisturbed")))
    real = datasets.load_dataset

    class Breaking:
        def __init__(self, stream):
            self.stream, self.info, self.state_dict = stream, stream.info, stream.state_dict

        def __iter__(self):
            for count, row in enumerate(self.stream):
                if count == 1400:
                    raise ConnectionError("reset by peer\nand more")
                yield row

    with monkeypatch.context() as broken:
        broken.setattr(datasets, "load_dataset", lambda *what, **how: Breaking(real(*what, **how)))
        with mistake("HuggingFaceFW/fineweb", "ConnectionError: reset by peer", "the same command continues"):
            build(DataConfig(**keys, dir=str(tmp_path / "broken")))
    assert not (tmp_path / "broken" / manifest.NAME).exists()
    assert building._read_progress(tmp_path / "broken")["cursor"]["row"] > 0
    newest_commit(monkeypatch, "f" * 40)  # main has moved on
    build(DataConfig(**keys, dir=str(tmp_path / "broken")))
    for file in (tmp_path / "undisturbed").iterdir():
        assert (tmp_path / "broken" / file.name).read_bytes() == file.read_bytes()


def test_without_a_network_there_is_one_line(tmp_path, monkeypatch, mistake):
    def fail(*_, **__):
        raise RuntimeError("Name or service not known\nstack")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    for keys in ({}, {"pretokenized": "kjj0/fineweb10B-gpt2", "download": True}):
        config = DataConfig(**FINEWEB, **keys, dir=str(tmp_path / "out"), tokenizer="gpt2")
        repository = keys.get("pretokenized", "HuggingFaceFW/fineweb")
        with mistake(repository, "RuntimeError: Name", "the same command continues", "data=local data.source=FOLDER"):
            (prepare if keys else build)(config)
        assert not (tmp_path / "out").exists()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """kjj0/fineweb10B-gpt2 with three training shards of 1,000 tokens; returns what was fetched."""
    store, fetched = tmp_path / "store", []
    store.mkdir()
    for i, split in enumerate(["val", "train", "train", "train"]):
        write_shard(store / f"fineweb_{split}_{i:06d}.bin", np.arange(1000) + i)
    (store / ".gitattributes").write_text("")

    def get(repository, name, *, repo_type, revision, local_dir, force_download):
        assert (repository, repo_type, revision, force_download) == ("kjj0/fineweb10B-gpt2", "dataset", COMMIT, True)
        fetched.append(name)
        return shutil.copy(store / name, local_dir)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", get)
    names = [*(path.name for path in store.iterdir())]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: names)
    newest_commit(monkeypatch, COMMIT)
    return store, fetched


def ready(tmp_path, **keys) -> DataConfig:
    keys = {"pretokenized": "kjj0/fineweb10B-gpt2", "download": True, "dir": str(tmp_path / "out"), **keys}
    return DataConfig(**FINEWEB, tokenizer="gpt2", **keys)


def test_the_first_shards_are_fetched_and_later_more(tmp_path, shelf, monkeypatch):
    _, fetched = shelf
    prepare(ready(tmp_path, tokens=1500))
    assert fetched == ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    split = open_split(ready(tmp_path))
    assert (len(split.train), len(split.val), split.vocab_size) == (2, 1, 50257)
    assert manifest.verify_folder(tmp_path / "out") == []
    prepare(ready(tmp_path, tokens=2000))
    assert len(fetched) == 3, "two shards are enough"
    newest_commit(monkeypatch, "f" * 40)  # main has moved on
    prepare(ready(tmp_path))
    prepare(ready(tmp_path))
    assert fetched[3:] == ["fineweb_train_000003.bin"]
    assert len(open_split(ready(tmp_path)).train) == 3


def test_a_corrupt_shard_is_named_and_fetched_again(tmp_path, shelf, mistake):
    store, fetched = shelf
    good = (store / "fineweb_train_000001.bin").read_bytes()
    (store / "fineweb_train_000001.bin").write_bytes(good[:-2])
    with mistake(str(tmp_path / "out" / "fineweb_train_000001.bin"), "3022 bytes"):
        prepare(ready(tmp_path, tokens=1))
    assert not (tmp_path / "out" / manifest.NAME).exists()
    (store / "fineweb_train_000001.bin").write_bytes(good)
    prepare(ready(tmp_path, tokens=1))
    assert fetched == ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000001.bin"]
    assert manifest.verify_folder(tmp_path / "out") == []


def test_a_repository_without_shards_is_named(tmp_path, shelf, monkeypatch, mistake):
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: ["fineweb_val_000000.bin"])
    with mistake("data.pretokenized=kjj0/fineweb10B-gpt2", "*_train_*.bin", "name another"):
        prepare(ready(tmp_path))


def test_the_end_of_a_fetched_name_decides(tmp_path, shelf, monkeypatch):
    """A repository called after its split, with files beside the shards."""
    store, fetched = shelf
    names = []
    for file in sorted(store.glob("*.bin")):
        names.append(file.name.replace("fineweb", "c4_train_val_set"))
        file.rename(store / names[-1])
    listed = [*names, "README.md", "x_train_old.bin", "x_val_notes.txt"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: listed)
    prepare(ready(tmp_path))
    split = open_split(ready(tmp_path))
    assert [file.name for file in (*split.train, *split.val)] == names and sorted(fetched) == names
    assert manifest.read_manifest(tmp_path / "out")["tokens"] == {"train": 3000, "val": 1000}


def test_what_was_prepared_here_is_not_fetched_over(tmp_path, hub, shelf):
    build(DataConfig(**FINEWEB, dir=str(tmp_path / "out"), tokenizer="gpt2"))
    prepare(ready(tmp_path))
    assert shelf[1] == []
