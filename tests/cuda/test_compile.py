"""Compilation, counted on the CPU: a graph for each compiled function and mode, none split, none made twice."""

from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer import attention
from trainer.mesh import ParallelConfig
from trainer.model import GPTConfig
from trainer.parallel import Parallel

LENGTH, VOCABULARY = 16, 250
GRAPHS = 4  # of a block and of the loss, with and without gradients; all blocks share theirs

PLAIN_COMPILE = nn.Module.compile

compiled: list[torch.fx.GraphModule] = []  # what a backend was given


def backend(graph, inputs):
    compiled.append(graph)
    return graph.forward


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What the counters say does not depend on the backend; this one compiles in no time."""
    monkeypatch.setattr(attention, "as_one_product", lambda x: True)  # as on CUDA
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    counters.clear()
    with torch._dynamo.config.patch():
        yield
    torch._dynamo.reset()


def started(mode: str = "single", dtype: torch.dtype = torch.float32, **settings) -> Parallel:
    ranks = dist.get_world_size() if mode == "ddp" else 1
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=ranks, process_index=0,
                                  local_process_index=0)  # fmt: skip
    settings = dict(compile=True) | settings
    return Parallel(ParallelConfig(mode=mode, **settings), mode, accelerator, None, dtype, 0)


def graphs_of_a_run(parallel: Parallel, sequences: int, document_start: int | None = None, **settings) -> int:
    """Of three updates and evaluations (the fake process group has no backward pass)."""
    config = GPTConfig(**dict(n_layer=3, n_head=2, n_embd=32) | settings)
    model = parallel.wrap(config, VOCABULARY, LENGTH, document_start)
    compiled.clear()
    for _ in range(3):
        tokens = torch.randint(VOCABULARY, (sequences, LENGTH))
        with parallel.accumulate(model, last=True):
            loss = model(tokens, tokens)
            if parallel.mode == "single":
                loss.backward()
        with parallel.evaluation(model):
            model(tokens, tokens)
    return len(compiled)


@pytest.mark.parametrize("dtype, recompute, settings", [
    (torch.float32, "none", dict()),
    (torch.bfloat16, "full", dict(norm="layernorm", activation="gelu", tied=True)),
    (torch.bfloat16, "selective", dict(position="half_rope", qk_norm=True)),
    (torch.float32, "none", dict(softcap=15.0, document_start=0, loss_chunk=8)),
])  # fmt: skip
def test_a_graph_for_each_function_and_none_broken(dtype, recompute, settings):
    assert graphs_of_a_run(started(dtype=dtype, activation_checkpointing=recompute), 2, **settings) == GRAPHS
    assert not counters["graph_break"]


def test_recomputed_and_compiled_blocks_note_the_largest_logits_of_their_passes(monkeypatch):
    """For optim.qk_clip: what is made again in the backward pass counts no pass twice, and compilation loses none."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(PLAIN_COMPILE, backend="aot_eager"))
    noted, generator = [], torch.Generator().manual_seed(0)  # with which the second batch has larger ones
    batches = torch.randint(VOCABULARY, (2, 2, 2, LENGTH), generator=generator)
    for settings in (dict(compile=False), dict(activation_checkpointing="selective")):
        parallel = started(**settings)
        model = parallel.wrap(GPTConfig(n_layer=1, n_head=2, n_embd=32), VOCABULARY, LENGTH)
        largest = model.blocks[0].attn.note_largest(parallel.device, torch.float32)
        for last, batch in enumerate(batches):
            with parallel.accumulate(model, last=bool(last)):
                model(*batch).backward()
            noted.append(largest.clone())
    one, both = noted[:2]
    assert (one > 0).any() and not torch.equal(one, both)
    assert torch.equal(one, noted[2]) and torch.equal(both, noted[3])


def test_every_job_of_a_sweep_is_compiled_for_its_own_shapes():
    """In one process, as under torchrun: otherwise the second job's graphs are symbolic, the sixth's too many."""
    assert [graphs_of_a_run(started(), sequences) for sequences in (1, 2, 3)] == [GRAPHS] * 3


def test_what_cannot_be_compiled_again_ends_the_run():
    """A warning, and blocks that run uncompiled, would falsify every time that the record tells."""
    torch._dynamo.config.recompile_limit, torch._dynamo.config.automatic_dynamic_shapes = 2, False
    model = started().wrap(GPTConfig(n_layer=1, n_head=2, n_embd=32), VOCABULARY, LENGTH)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for sequences in range(1, 5):
            model(*torch.zeros(2, sequences, LENGTH, dtype=torch.int64))


def test_replicas_do_not_split_the_graphs():
    """A block of 1.7 MB, more than DDP's first bucket holds."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        assert graphs_of_a_run(started("ddp"), 2, n_embd=192) == GRAPHS
    finally:
        dist.destroy_process_group()
