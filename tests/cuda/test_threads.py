"""A thread begins on GPU 0: each is told which one is its rank's before it touches CUDA."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import Loader
from data.shards import write_shard
from tests.runs import TINY
from trainer.launch import load_config
from trainer.model import GPT
from trainer.run import checkpoint

DEVICE = torch.device("cuda:3")


@pytest.fixture
def chosen(monkeypatch):
    """(thread, device) of every call of set_device."""
    found = []
    note = lambda device: found.append((threading.current_thread().name, device))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_device", note)
    return found


def test_the_loader_thread_stays_on_its_ranks_device(tmp_path, chosen):
    write_shard(tmp_path / "x_train_000000.bin", np.arange(1000, dtype=np.uint16))
    files = [tmp_path / "x_train_000000.bin"]
    loader = Loader(files, seq_len=8, batch_sequences=4, order="sequential", device=DEVICE)
    loader._worker.submit(int).result()
    loader.close()
    assert chosen == [("loader_0", DEVICE)]


def test_the_checkpoint_thread_stays_on_its_ranks_device(tmp_path, monkeypatch, chosen):
    staged, groups = [], []
    monkeypatch.setattr(checkpoint.dist, "new_group", lambda **options: groups.append(options["backend"]))
    monkeypatch.setattr(
        checkpoint, "DefaultStager", lambda options: staged.append(options) or SimpleNamespace(close=int)
    )
    config = load_config([*TINY, f"run.dir={tmp_path}"])
    parallel = SimpleNamespace(world_size=8, mode="ddp", device=DEVICE, config=config.parallel)
    split = SimpleNamespace(tokenizer="byte", fingerprint={})
    checkpoints = checkpoint.Checkpoints(config, parallel, GPT(config.model, 257, 8), None, {}, split, int)
    checkpoints.pool.submit(int).result()
    checkpoints.close()
    assert chosen == [("checkpoint_0", DEVICE)] and groups == ["gloo"], "connected at once, and not by way of a device"
    assert staged[0].use_pinned_memory and not staged[0].use_async_staging, "one copy of the state, used again"
