"""The peak that a plan foretells is what a rank then allocates, within 10%, as one of up to four ranks."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from optim.matrix import local
from scripts import plan
from scripts.plan import Costs
from tests.scripts.fake_ranks import as_rank, costs_of


class Resident(TorchDispatchMode):
    """``peak``: the most bytes at once of all storages that any operation has met, as large as they are just then:
    FSDP2 gives memory back, and takes it again, by resizing."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor) and not value.is_meta:
                storage = local(value).untyped_storage()
                self.storages.setdefault(storage._cdata, StorageWeakRef(storage))
        self.storages = {key: ref for key, ref in self.storages.items() if not ref.expired()}
        there = (torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self.storages.values())
        self.peak = max(self.peak, sum(storage.nbytes() for storage in there if storage is not None))
        return result


def measured(costs: Costs) -> int:
    """The peak of the second update of the rank that is to need most in the step."""
    needed = [sum(of) for of in zip(costs.state_bytes, costs.exchange_bytes, strict=True)]
    with Resident() as resident, as_rank(costs, needed.index(max(needed))) as rank:
        for _ in range(2):
            resident.peak = 0
            rank.forward_backward()
            rank.optimizers.step()
            rank.optimizers.zero_grad()
    return resident.peak


pytestmark = pytest.mark.usefixtures("filled")


RENEWED = "optim.matrix.update_freq=1 train.seq_len=16 train.batch_tokens=64"  # roots and bases: their step is the peak
CASES = {
    "recompute": (1, "parallel.activation_checkpointing=full"),
    "recompute all but products": (1, "parallel.activation_checkpointing=selective"),
    "signum": (1, "optim=signum train.seq_len=16 train.batch_tokens=64"),
    "fsdp passes": (4, "parallel=fsdp train.micro_batch=1"),
}
MORE = {
    "passes": (1, "train.micro_batch=2"),
    "chunks": (1, "model.loss_chunk=64 model.position=rope model.qk_norm=true data.document_mask=true"),
    "gpt2": (1, "model.activation=gelu model.norm=layernorm model.bias=true model.tied=true optim=adamw"),
    "bfloat16": (1, "train.dtype=bfloat16"),
    "soap": (1, f"optim=soap {RENEWED}"),
    "ddp": (2, "parallel=ddp"),
    "fsdp": (3, "parallel=fsdp train.dtype=bfloat16"),
    "fsdp shampoo": (2, f"parallel=fsdp optim=shampoo {RENEWED}"),
    "fsdp soap": (2, f"parallel=fsdp optim=soap {RENEWED} model.n_layer=4 model.n_embd=256"),
    "hsdp": (4, "parallel=hsdp"),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)])
def test_peak_memory(case):
    ranks, words = (CASES | MORE)[case]
    small = ["experiment=smoke", "train.batch_tokens=768", "train.seq_len=64", "model.n_layer=2", "model.n_embd=64"]
    costs = costs_of([*small, "train.dtype=float32", *words.split()], "cpu", ranks)
    found, peak = measured(costs), costs.memory(costs.train.micro_batch)["peak"]
    print(f"{case}: planned {peak / 1e6:.2f} MB, measured {found / 1e6:.2f} MB, ratio {peak / found:.3f}")
    assert peak == pytest.approx(found, rel=0.1)


def test_a_model_that_reads_its_values(capsys):
    words = ["experiment=smoke", "model=custom", "model._target_=tests.scripts.reads_values.ReadsValues"]
    assert plan.main([*words, "--device", "cpu", "--ranks", "1"]) == 1
    assert "ReadsValues" in (line := capsys.readouterr().err) and line.count("\n") == 1
