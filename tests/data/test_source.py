"""A source of one's own, added as a stranger would: one Python file, one YAML, nothing changed here."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest

from data import build as building
from data.build import build
from data.config import DataConfig
from data.manifest import verify_folder
from data.shards import open_shard
from data.sources import open_source
from data.split import open_split

ROOT = Path(__file__).resolve().parents[2]
SOURCE = """
from data.documents import Document, batch_documents

class Counting:
    name, revision = "counting", None
    def __init__(self, count=2000, word="number"):
        self.count, self.word, self.identity, self.starts = count, word, f"{count} {word}", []
    def batches(self, cursor):
        first = cursor["at"] if cursor else 0
        self.starts.append(first)
        return batch_documents((Document(f"{self.word} {n}"), {"at": n + 1}, None) for n in range(first, self.count))

class WithValidation(Counting):
    val_documents = 30

class Nameless:
    revision, identity, batches = None, "x", None

class Numbered(Counting):
    name = 7

class Unidentified(Counting):
    def __init__(self):
        super().__init__()
        self.identity = None

number = 3
"""
YAML = """
name: mine
source: {_target_: stranger.Counting, count: 1500}
tokenizer: byte
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch) -> Path:
    """A folder with stranger.py and data/mine.yaml, the module importable here and in child processes."""
    (tmp_path / "stranger.py").write_text(SOURCE)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(YAML)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    yield tmp_path
    sys.modules.pop("stranger", None)


def config_of(folder: Path, target: str = "stranger.Counting", **settings) -> DataConfig:
    source = {"_target_": target, **settings}
    return DataConfig("mine", source, dir=str(folder / "out"), tokenizer="byte", shard_tokens=5000, workers=1)


def tokens_of(config: DataConfig) -> list[list[int]]:
    split = open_split(config)
    return [np.concatenate([open_shard(file) for file in files]).tolist() for files in (split.val, split.train)]


def start(program: str, folder: Path, *overrides: str) -> str:
    command = [
        sys.executable,
        str(ROOT / program),
        *overrides,
        f"hydra.searchpath=[{folder}]",
        f"data.dir={folder}/out",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_file_and_one_yaml_prepare(stranger):
    assert "from 1500 documents" in start("scripts/prepare_data.py", stranger, "data=mine")
    val, train = tokens_of(config_of(stranger, count=1500))
    assert val + train == [token for n in range(1500) for token in [256, *f"number {n}".encode()]]
    assert verify_folder(stranger / "out") == []


@pytest.mark.slow
def test_one_file_and_one_yaml_train(stranger):
    start("scripts/prepare_data.py", stranger, "data=mine")
    sizes = ["experiment=smoke", "train.steps=2", "train.batch_tokens=256", "train.seq_len=64", "eval.tokens=256"]
    said = start("train.py", stranger, "data=mine", "run.dir=run", "logger=jsonl", *sizes)
    assert "step 2/2" in said and "final val loss" in said


def test_a_stopped_preparation_continues_at_its_cursor(stranger, monkeypatch):
    monkeypatch.setattr(building, "CHECKPOINT_SECONDS", 0.0)
    config, opened = config_of(stranger), []
    build(config)
    expected = {file.name: file.read_bytes() for file in config.folder.iterdir()}

    def stop(tokens, fraction):
        raise KeyboardInterrupt

    config.dir += "2"
    with pytest.raises(KeyboardInterrupt):
        build(config, stop)
    monkeypatch.setattr(building, "open_source", lambda *what: opened.append(open_source(*what)) or opened[-1])
    build(config)
    assert opened[0].starts == [256], "one batch of documents was on disk"
    assert {file.name: file.read_bytes() for file in config.folder.iterdir()} == expected


def test_another_identity_is_another_corpus(stranger, mistake):
    build(config_of(stranger, count=500))
    build(config_of(stranger, count=500))
    with mistake(f"data.dir={stranger}/out", "500 number", "500 word", "choose another"):
        build(config_of(stranger, count=500, word="word"))


def test_a_source_may_hold_out_documents_of_its_own(stranger):
    config = config_of(stranger, "stranger.WithValidation", count=100)
    build(config)
    expected = [[256, *f"number {n}".encode()] for n in range(100)]
    assert tokens_of(config) == [sum(expected[:30], []), sum(expected[30:], [])]
    config.dir, config.val_tokens = f"{config.dir}2", 50
    build(config)
    assert len(tokens_of(config)[0]) == 50, "data.val_tokens comes first"


@pytest.mark.parametrize(
    ("target", "settings", "said"),
    [
        ("no.such.Source", {}, ["No module named", "MODULE.CLASS", "PYTHONPATH"]),
        ("stranger.Missing", {}, ["Missing", "MODULE.CLASS"]),
        ("stranger.number", {}, ["not a class", "constructor"]),
        ("stranger.Counting", {"cuont": 3}, ["cuont", "data.source.SETTING"]),
        ("stranger.Nameless", {}, ["name is missing", "data/documents.py"]),
        ("stranger.Numbered", {}, ["name is 7", "data/documents.py"]),
        ("stranger.Unidentified", {}, ["identity", "give one"]),
    ],
)
def test_a_wrong_class_is_named(stranger, mistake, target, settings, said):
    with mistake(f"data.source._target_={target}", *said):
        build(config_of(stranger, target, **settings))
    assert not (stranger / "out").exists()


def test_the_example_of_the_documentation(tmp_path):
    config = config_of(tmp_path, "examples.squares_source.Squares", count=300)
    build(config)
    assert sum(tokens_of(config), [])[:18] == [256, *b"0 squared is 0.", 256, *b"1"]
    source = open_source(config)
    whole = list(source.batches(None))
    assert list(source.batches(whole[0].cursor)) == whole[1:]


def test_no_import_circle():
    """Over all of data/, imports inside functions too."""
    graph = {}
    for file in (ROOT / "data").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        graph[name] = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
        graph[name] |= {node.module for node in nodes}
    graph.pop("data")  # its names are imported when first used
    order = list(TopologicalSorter({name: needs & graph.keys() for name, needs in graph.items()}).static_order())
    assert order.index("data.documents") < order.index("data.sources.local") < order.index("data.build")
