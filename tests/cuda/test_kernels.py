"""What a step asks of a GPU, counted for GPT-2 124M's matrices and held against budget.json, which only shrinks.

A foreach operation counts as one kernel; torch cuts long lists into a few launches.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from optim import SOAP, Muon, NorMuon, Shampoo
from optim.combined import Combined
from tests.cuda.fake import GPT2, Kernels, fake_cuda, parameters
from tests.runs import ROOT
from trainer.guard import guarded_step
from trainer.mesh import ParallelConfig, build_mesh
from trainer.model import GPTConfig
from trainer.parallel import Parallel
from trainer.run.micro_batch import runs_out

BUDGET = json.loads((Path(__file__).parent / "budget.json").read_text())
RULES = {"Muon": Muon, "NorMuon": NorMuon, "SOAP": SOAP, "Shampoo": Shampoo}


@pytest.mark.parametrize("name, layout", [(name, layout) for name in BUDGET for layout in BUDGET[name]])
def test_kernels_of_a_step(name, layout):
    rule, _, guarded = name.partition(", ")
    with fake_cuda(layout) as parallel:
        named = [(f"{i}", parameter) for i, parameter in enumerate(parameters(GPT2, parallel))]
        optimizer = RULES[rule](named, process_group=parallel.replicas)
        for group in optimizer.param_groups:
            group["step"] = 4
        with Kernels() as gpu:
            if guarded:
                optimizers = Combined([dict(optimizer=lambda _, built=optimizer: built, params=named)])
                guarded_step(optimizers, torch.tensor(False, device="cuda"))
            else:
                optimizer.step()
    budget, most = BUDGET[name][layout], gpu.kernels.most_common(6)
    assert gpu.count <= budget, f"{gpu.count} kernels, {budget} are allowed: {most}"
    assert gpu.count >= 0.9 * budget, f"write {gpu.count} down in budget.json, so that it stays so"


def test_the_budget_is_what_the_docs_say():
    counts = [count for layouts in BUDGET.values() for count in layouts.values()]
    assert f"{min(counts)} to {max(counts)} kernels" in " ".join((ROOT / "docs/performance.md").read_text().split())


@pytest.mark.parametrize("passes, gathers", [(1, 25), (2, 13), (3, 13)])
def test_weights_are_gathered_once_however_many_micro_batches(passes, gathers):
    """FSDP over 8 ranks, 12 blocks and the root; with one micro-batch, blocks once more in the backward pass."""
    dist.init_process_group("fake", rank=1, world_size=8, store=FakeStore())
    try:
        settings, cpu = ParallelConfig(mode="fsdp"), torch.device("cpu")
        accelerator = SimpleNamespace(device=cpu, num_processes=8, process_index=1, local_process_index=1)
        mesh = build_mesh(settings, "fsdp", "cpu", 8)
        parallel = Parallel(settings, "fsdp", accelerator, mesh, torch.bfloat16, 0)
        model = parallel.wrap(GPTConfig(n_layer=12, n_head=2, n_embd=16), 70, 9)
        tokens = torch.zeros(2, 9, dtype=torch.int64)
        with Kernels() as counted:  # to see if there is room, ranks do not wait for each other
            assert not runs_out(model, parallel, [tokens, tokens], beside=0)
        assert counted.collectives == {"_allgather_base_": 13}
        for _ in range(2):
            with Kernels() as counted:
                for i in range(passes):
                    with parallel.accumulate(model, last=i + 1 == passes):
                        model(tokens, tokens).backward()
            assert counted.collectives == {"_allgather_base_": gathers, "_reduce_scatter_base_": 13}
            assert all(isinstance(p, DTensor) for p in model.parameters())
            with parallel.evaluation(model):
                model(tokens, tokens)
            assert all(isinstance(p, DTensor) for p in model.parameters())
    finally:
        dist.destroy_process_group()
