"""The hub, played by local files: `datasets` really streams them, only the address is replaced."""

import json
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common import UserError
from data import build as building
from data import download, manifest
from data.build import build, prepare
from data.config import DataConfig
from data.shards import open_shard, write_shard
from data.sources import hub as hub_source
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
    monkeypatch.setattr(fineweb, "commit", lambda repository, revision: revision or COMMIT)
    return calls


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


def test_a_failing_network_loses_nothing(hub, tmp_path, monkeypatch):
    """The connection breaks after the second batch; the same command continues at the commit it began with."""
    monkeypatch.setattr(building, "CHECKPOINT_SECONDS", 0.0)
    keys = {**FINEWEB, "tokenizer": "byte", "shard_tokens": 50_000, "workers": 1}
    build(DataConfig(**keys, dir=str(tmp_path / "undisturbed")))
    real = fineweb.open_stream

    class Breaking:
        def __init__(self, stream):
            self.stream, self.info, self.state_dict = stream, stream.info, stream.state_dict

        def __iter__(self):
            for count, row in enumerate(self.stream):
                if count == 1400:
                    raise ConnectionError("reset by peer\nand more")
                yield row

    with monkeypatch.context() as broken:
        broken.setattr(fineweb, "open_stream", lambda *arguments: Breaking(real(*arguments)))
        with pytest.raises(UserError, match="ConnectionError: reset by peer.*the same command continues") as caught:
            build(DataConfig(**keys, dir=str(tmp_path / "broken")))
    assert "\n" not in str(caught.value) and not (tmp_path / "broken" / manifest.NAME).exists()
    assert building._read_progress(tmp_path / "broken")["cursor"]["row"] > 0
    monkeypatch.setattr(fineweb, "commit", lambda repository, revision: revision or "f" * 40)  # main has moved on
    build(DataConfig(**keys, dir=str(tmp_path / "broken")))
    for file in (tmp_path / "undisturbed").iterdir():
        assert (tmp_path / "broken" / file.name).read_bytes() == file.read_bytes()


def test_without_a_network_there_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Name or service not known\nstack")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    for keys in ({}, {"pretokenized": "kjj0/fineweb10B-gpt2", "download": True}):
        config = DataConfig(**FINEWEB, **keys, dir=str(tmp_path / "out"), tokenizer="gpt2")
        with pytest.raises(UserError, match=r"not available from the Hugging Face hub \(RuntimeError: Name") as caught:
            (prepare if keys else build)(config)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


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
    monkeypatch.setattr(fineweb, "list_files", lambda *_: sorted(path.name for path in store.iterdir()))
    monkeypatch.setattr(fineweb, "commit", lambda repository, revision: revision or COMMIT)
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
    monkeypatch.setattr(fineweb, "commit", lambda repository, revision: revision or "f" * 40)  # main has moved on
    prepare(ready(tmp_path))
    prepare(ready(tmp_path))
    assert fetched[3:] == ["fineweb_train_000003.bin"]
    assert len(open_split(ready(tmp_path)).train) == 3


def test_a_corrupt_shard_is_named_and_fetched_again(tmp_path, shelf):
    store, fetched = shelf
    good = (store / "fineweb_train_000001.bin").read_bytes()
    (store / "fineweb_train_000001.bin").write_bytes(good[:-2])
    with pytest.raises(UserError, match="out/fineweb_train_000001.bin: 3022 bytes"):
        prepare(ready(tmp_path, tokens=1))
    assert not (tmp_path / "out" / manifest.NAME).exists()
    (store / "fineweb_train_000001.bin").write_bytes(good)
    prepare(ready(tmp_path, tokens=1))
    assert fetched == ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000001.bin"]
    assert manifest.verify_folder(tmp_path / "out") == []


def test_a_repository_without_shards_is_named(tmp_path, shelf):
    for file in shelf[0].glob("*train*"):
        file.unlink()
    with pytest.raises(UserError, match=r"data.pretokenized=kjj0/fineweb10B-gpt2: holds no \*_train_"):
        prepare(ready(tmp_path))


def test_what_was_prepared_here_is_not_fetched_over(tmp_path, hub, shelf):
    build(DataConfig(**FINEWEB, dir=str(tmp_path / "out"), tokenizer="gpt2"))
    prepare(ready(tmp_path))
    assert shelf[1] == []
