"""The index of a checkpoint: nothing is unpickled, and what is not an index of its tensors is told in one line."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tests.errors import raises_naming
from tests.runs import SHORT
from trainer.loop import Trainer
from trainer.run import storage
from trainer.run.dcp_index import read_weights
from trainer.run.storage import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, configure):
    trainer = Trainer(configure(*SHORT, f"run.dir={tmp_path_factory.mktemp('runs') / 'run'}"))
    trainer.run()
    return trainer.checkpoints.folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def rewritten(folder: Path, name: str, content: bytes) -> None:
    """A file of a checkpoint with other content, which its manifest says is right."""
    (folder / name).write_bytes(content)
    files = {path.name: storage.fingerprint(path) for path in folder.iterdir() if path.name != storage.MANIFEST}
    storage.write_manifest(folder, 6, files)
    storage.verify(folder)


def test_nothing_is_unpickled(copy, tmp_path):
    """Not even DCP's own index, which other tools read."""
    folder = storage.folder_of(copy, 6)
    before = read_weights(folder)

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    rewritten(folder, ".metadata", pickle.dumps(Bomb()))
    for name, value in read_weights(folder).items():
        assert torch.equal(value, before[name])
    assert not (tmp_path / "exploded").exists()


FIRST = "model.wte.weight"


def halved(chunk):
    return {**chunk, "shape": [chunk["shape"][0] // 2, *chunk["shape"][1:]]}


@pytest.mark.parametrize("change", [
    lambda index: index[FIRST]["chunks"][0].update(file="../../secret"),
    lambda index: index[FIRST]["chunks"][0].update(file=3),
    lambda index: index[FIRST]["chunks"][0].pop("start"),
    lambda index: index[FIRST]["chunks"][0].update(bytes="many"),
    lambda index: index[FIRST]["chunks"][0].update(offset=["a"]),
    lambda index: index[FIRST]["chunks"][0].update(offset=[0, 1]),  # one column would keep what was in memory
    lambda index: index[FIRST]["chunks"][0].update(offset=[0]),
    lambda index: index[FIRST].update(chunks=2 * [halved(index[FIRST]["chunks"][0])]),
    lambda index: index[FIRST]["chunks"][0].update(start=10**9),
    lambda index: index[FIRST]["chunks"][0].update(start=-8),
    lambda index: index[FIRST]["chunks"][0].update(bytes=10),
    lambda index: index[FIRST]["chunks"][0].update(file="__9_9.distcp"),
    lambda index: index[FIRST]["chunks"].clear(),
    lambda index: index[FIRST].update(dtype="float64"),
    lambda index: index[FIRST].update(dtype="load"),
    lambda index: index[FIRST].update(dtype=["float32"]),
    lambda index: index[FIRST].update(shape=None),
    lambda index: index[FIRST].update(shape=[10**30]),
    lambda index: index.update({FIRST: "bytes"}),
    lambda index: index.update({FIRST: {}}),
])  # fmt: skip
def test_an_index_that_is_none_is_one_line(copy, change):
    folder = storage.folder_of(copy, 6)
    index = json.loads((folder / storage.INDEX).read_text())
    change(index)
    rewritten(folder, storage.INDEX, json.dumps(index).encode())
    with raises_naming(CheckpointError, folder, "index.json", "index of tensors"):
        read_weights(folder)


@pytest.mark.parametrize("config", [{"average.blend": 0.5}, {"average.blend": "x"}])
def test_a_state_that_lacks_what_its_average_needs_is_one_line(copy, config):
    folder = storage.folder_of(copy, 6)
    state = json.loads((folder / storage.STATE).read_text()) | {"config": config}
    rewritten(folder, storage.STATE, json.dumps(state).encode())
    with raises_naming(CheckpointError, folder, storage.STATE, "average"):
        read_weights(folder)


@pytest.mark.parametrize("content", [b"[]", b"{", b"[" * 100_000, b"\0", b"\xff\xfe", b"3"])
def test_an_index_that_is_not_json_is_one_line(copy, content):
    folder = storage.folder_of(copy, 6)
    rewritten(folder, storage.INDEX, content)
    with raises_naming(CheckpointError, folder, "index.json"):
        read_weights(folder)


@pytest.mark.parametrize(("change", "words"), [
    ({"step": 5}, ["step 5"]),
    ({"step": "6"}, ["'step'", "'6'"]),
    ({"config": None}, ["'config'"]),
    ({"numbers": []}, ["'numbers'"]),
    ({"world_size": "two"}, ["'world_size'", "'two'"]),
])  # fmt: skip
def test_a_state_that_lacks_something_is_one_line(copy, change, words):
    folder = storage.folder_of(copy, 6)
    state = json.loads((folder / storage.STATE).read_text()) | change
    rewritten(folder, storage.STATE, json.dumps(state).encode())
    with raises_naming(CheckpointError, folder, "state.json", *words):
        storage.read_state(folder)


@pytest.mark.parametrize("name", ["pipe", "a\0b", "../x", "sub/x", "sub"])
def test_a_manifest_that_names_what_is_no_file_of_the_folder(copy, name):
    """A pipe is not waited for."""
    folder = storage.folder_of(copy, 6)
    os.mkfifo(folder / "pipe")
    (folder / "sub").mkdir()
    files = storage.read_json(folder, storage.MANIFEST)["files"] | {name: {"size": 0, "sha256": ""}}
    storage.write_manifest(folder, 6, files)
    with raises_naming(CheckpointError, folder):
        storage.verify(folder)
