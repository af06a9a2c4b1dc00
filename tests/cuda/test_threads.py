"""A thread begins on GPU 0: each is told which one is its rank's before it touches CUDA."""

import threading

import numpy as np
import torch

from data import Loader
from data.shards import write_shard


def test_the_loader_thread_stays_on_its_ranks_device(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append((threading.current_thread().name, device)))
    write_shard(tmp_path / "x_train_000000.bin", np.arange(1000, dtype=np.uint16))
    files = [tmp_path / "x_train_000000.bin"]
    loader = Loader(files, seq_len=8, batch_sequences=4, order="sequential", device="cuda:3")
    loader._worker.submit(int).result()
    loader.close()
    assert seen == [("loader_0", torch.device("cuda:3"))]
