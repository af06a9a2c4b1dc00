"""What goes between host and device without either waiting: pinned memory, and events on the right stream."""

import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from data import eval_batches
from data.shards import write_shard
from optim import exchange
from optim.guarded import read_later
from tests.runs import SHORT
from trainer.launch import load_config

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def test_a_flag_is_read_after_its_copy_whichever_device_is_current(monkeypatch):
    """cuda:3's, while another is: an event on that one's stream would be over before the copy."""
    done = []

    class Event:
        def record(self, stream):
            done.append(f"record on {stream}")

        def synchronize(self):
            done.append("synchronize")

    class Number:
        device = torch.device("cuda", 3)

        def copy_(self, source, non_blocking):
            done.append(f"copy, non_blocking={non_blocking}")

        def __bool__(self):
            done.append("read")
            return True

    monkeypatch.setattr(torch, "empty_like", lambda tensor, *, device, pin_memory: Number())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the stream of {device}")
    ask = read_later(Number())
    assert done == ["copy, non_blocking=True", "record on the stream of cuda:3"]
    assert ask() and done[2:] == ["synchronize", "read"]


def test_ranks_compare_their_plans_by_way_of_the_hosts(monkeypatch):
    monkeypatch.setattr(exchange.dist, "get_backend", lambda group: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(exchange.dist, "get_process_group_ranks", lambda group: [1, 3])
    monkeypatch.setattr(exchange.dist, "new_group", lambda ranks, *, backend, **options: (ranks, backend))
    assert exchange._host_group(object()) == ([1, 3], "gloo")


def test_batches_of_an_evaluation_do_not_let_the_host_wait(tmp_path, monkeypatch):
    pinned, sent = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(id(self)) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking=False: sent.append(
        (id(self), device, non_blocking)) or self)  # fmt: skip
    write_shard(tmp_path / "x_val_000000.bin", np.arange(100, dtype=np.uint16))
    device = torch.device("cuda", 3)
    kept = list(eval_batches([tmp_path / "x_val_000000.bin"], seq_len=8, tokens=32, micro_batch=2, device="cuda:3"))
    assert len(kept) == 2 and sent == [(id(tensor), device, True) for batch in kept for tensor in batch]
    assert pinned == [number for number, _, _ in sent]


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_is_set_up_before_cuda_starts(own, monkeypatch):
    """What a user has set stays."""
    found = []

    def starts_cuda(*device):
        found.append({key: os.environ[key] for key in ALLOCATOR if key in os.environ})
        return SimpleNamespace(total_memory=2**34)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", starts_cuda)
    kept = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    with mock.patch.dict(os.environ, kept | ({own: "backend:native"} if own else {}), clear=True):
        load_config([word for word in SHORT if "micro_batch" not in word])
    expected = {own: "backend:native"} if own else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert found and all(seen == expected for seen in found)
