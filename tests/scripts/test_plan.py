"""A plan says what a run then has and does: the same parameters, states, bytes and collectives, for any ranks."""

import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from optim import routing
from optim.matrix import local
from optim.named_state import named_tensors
from optim.plan import numel
from scripts.benchmark_traffic import Traffic
from tests.errors import check_names
from tests.runs import SHORT, TINY, read_record
from trainer.mesh import build_mesh
from trainer.parallel import Parallel, unwrap

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import plan  # noqa: E402
from planning.costs import Costs  # noqa: E402
from planning.step import ATTENTION, HOP, SENT, STREAMED, TOUCHED, step_time  # noqa: E402

CALLS = {"alltoall_base_": "all_to_all", "broadcast_": "broadcast", "_allgather_base_": "all_gather",
         "_reduce_scatter_base_": "reduce_scatter"}  # fmt: skip


class Sent(Traffic):
    """Beside Traffic's all_to_all: what a rank sends in rings when weights are gathered and gradients reduced."""

    def __init__(self, rank: int, ranks: int):
        super().__init__(rank)
        self.ranks, self.in_rings, self.broadcast = ranks, 0.0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "c10d::_allgather_base_":
            self.in_rings += args[1].nbytes * (self.ranks - 1)
        elif name == "c10d::_reduce_scatter_base_":
            self.in_rings += args[1].nbytes * (self.ranks - 1) / self.ranks
        elif name == "c10d::broadcast_":
            self.broadcast += args[0][0].nbytes if args[2] == self.rank else 0
        return super().__torch_dispatch__(func, types, args, kwargs)


def real(costs: Costs, rank: int) -> SimpleNamespace:
    """What this process holds and sends as one of those ranks, which answer without sending anything."""
    config, ranks, sums = costs.config, costs.ranks, Counter()
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        mesh = build_mesh(config.parallel, costs.mode, "cpu", ranks)
        alone = SimpleNamespace(process_index=rank, local_process_index=rank, num_processes=ranks,
                                device=torch.device("cpu"))  # fmt: skip
        parallel = Parallel(config.parallel, costs.mode, alone, mesh, getattr(torch, config.train.dtype), 0)
        model = parallel.wrap(config.model, 257, config.train.seq_len)
        bare = unwrap(model)
        optimizers = routing.build_from_config(bare, asdict(config.optim), parallel.replicas, bare.head)
        batch = torch.zeros(config.train.micro_batch, config.train.seq_len, dtype=torch.int64)
        with Sent(rank % costs.shards, costs.shards) as passes:
            model = unwrap(model)  # DDP's reducer wants an answer; see test_buckets_of_ddp
            count = config.train.batch_tokens // batch.numel() // ranks
            for i in range(count):
                with parallel.accumulate(model, i + 1 == count):
                    model(batch, batch).backward()
        sums["weights"] = sum(local(p).nbytes for p in model.parameters())
        sums["gradients"] = sum(local(p.grad).nbytes for p in model.parameters())
        with Sent(rank if costs.mode == "ddp" else rank % costs.shards, costs.group) as steps:
            optimizers.step()
        states = [state for member in optimizers.members.values() for state in member.state.values()]
        sums["state"] = sum(local(t).nbytes for s in states for t in s.values() if isinstance(t, torch.Tensor))
    finally:
        dist.destroy_process_group()
    return SimpleNamespace(**sums, passes=passes, steps=steps)


pytestmark = pytest.mark.usefixtures("filled")


def calls(counter: Counter) -> dict[str, int]:
    return {CALLS[name]: count for name, count in counter.items() if name in CALLS}


def planned(counter: Counter) -> dict[str, int]:
    return {name: count for name, count in counter.items() if name in CALLS.values()}


@pytest.mark.parametrize("ranks, parallel, optim", [
    (2, "fsdp", "muon"), (4, "fsdp", "soap"), (4, "hsdp", "normuon"), (2, "ddp", "shampoo"), (3, "fsdp", "track3/muon"),
    (4, "hsdp", "soap optim.matrix.share=always"),
])  # fmt: skip
def test_every_rank_holds_and_sends_what_was_planned(ranks, parallel, optim):
    costs = Costs([*TINY, f"parallel={parallel}", *f"optim={optim}".split(), "model.n_layer=2", "train.micro_batch=2",
                   "train.dtype=float32"], "cpu", ranks)  # fmt: skip
    memory, (sent, exchange), (in_rings, model) = costs.memory(2), costs.exchange_traffic(), costs.model_traffic()
    elements = sum(spec.numel for found, _ in costs.exchanges for spec in found.specs)
    assert costs.shared == ("always" in optim)
    if costs.sharded and ranks % 2 == 0 and not costs.shared:  # shards are even then: 2 b S (W-1)/W^2
        shards = costs.shards
        assert sum(sent) / shards == pytest.approx(2 * 4 * elements * (shards - 1) / shards**2, rel=1e-12)
    for rank in range(costs.shards if costs.shared else costs.group):  # DTensor's caches keep the first copy's groups
        found = real(costs, rank)
        assert found.state == costs.state_bytes[rank]
        assert (found.steps.broadcast if parallel == "ddp" else found.steps.sent) == sent[rank]
        assert calls(found.steps.calls) == planned(exchange)
        if costs.sharded:
            assert found.passes.in_rings == pytest.approx(in_rings if parallel == "fsdp" else in_rings - reduced(costs))
            assert calls(found.passes.calls) == planned(model)
        if rank == 0:
            assert (found.weights, found.gradients) == (memory["weights"], memory["gradients"])


def test_buckets_of_ddp():
    """Those that torch's DDP has after its first update, on a group of this process alone."""
    words = [*TINY, "model.n_embd=512", "model.n_layer=3", "parallel=ddp", "train.dtype=float32"]
    costs = Costs(words, "cpu", 2)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model = DistributedDataParallel(costs.model.to_empty(device="cpu"), gradient_as_bucket_view=True)
        tokens = torch.zeros(1, 16, dtype=torch.int64)
        model(tokens, tokens).backward()  # buckets are made anew in the next forward pass
        with Traffic(0) as traffic:
            model(tokens, tokens).backward()
    finally:
        dist.destroy_process_group()
    in_ring, found = Costs(words, "cpu", 2).model_traffic()
    assert found == {"all_reduce": traffic.calls["allreduce_"]} and found["all_reduce"] > 2
    assert in_ring == sum(p.nbytes for p in costs.model.parameters()), "2 (W-1)/W of all"


def reduced(costs: Costs) -> float:
    """What the copies of an HSDP mesh send each other, by hand."""
    copies = costs.ranks // costs.shards
    return 2 * costs.memory(2)["gradients"] * (copies - 1) / copies


def test_one_process(run, tmp_path):
    trainer = run("run", "optim=soap", "average.blend=0.5")
    costs = Costs([*SHORT, "optim=soap", "average.blend=0.5"], "cpu", 1)
    state = list(named_tensors(trainer.optimizers).values())
    weights = list(trainer.model.parameters())
    assert costs.optimizers.table() == trainer.optimizers.table()
    assert costs.state_bytes == [sum(t.nbytes for t in state)]
    assert costs.memory(1)["weights"] == sum(w.nbytes for w in weights)
    copies = trainer.schedules.state().values()
    assert copies and costs.checkpoint_bytes() == sum(t.nbytes for t in [*weights, *state, *copies])
    assert costs.flops()[0] == trainer.model.flops_per_token() * 384 and not costs.exchange_traffic()[1]
    assert costs.train.micro_batch == trainer.config.train.micro_batch
    evaluated = sum("val/loss" in line for line in read_record(tmp_path / "run"))
    rows = plan.run(costs)
    assert [rows[key].split()[0] for key in ("updates", "evaluations", "checkpoints")] == ["6", str(evaluated), "3"]


def test_rules_work_is_shared_and_repeated_by_copies():
    def flops(ranks, *words):
        return Costs([*TINY, "model.n_layer=4", "train.dtype=float32", *words], "cpu", ranks).flops()

    alone, fsdp, hsdp = flops(1), flops(4, "parallel=fsdp"), flops(4, "parallel=hsdp")
    assert alone[0] == fsdp[0] == hsdp[0] and alone[1] == alone[2] == fsdp[1] == hsdp[1] / 2
    assert alone[2] / 4 <= fsdp[2] <= alone[2] / 3 and hsdp[2] == pytest.approx(alone[2] / 2, rel=0.1)
    assert flops(4, "parallel=hsdp", "optim.matrix.share=always") == fsdp


def test_what_fits_and_what_is_projected(capsys):
    """By hand for a rank of 64 sequences: more do not fit where less memory is left, and time is work over speed."""
    words = ["experiment=track3", "--ranks", "8"]
    assert plan.main([*words, "--efficiency", "0.5"]) == 0
    printed = capsys.readouterr().out
    costs = Costs(["experiment=track3"], "h100", 8)
    assert (costs.width, costs.exchanges[0][1], costs.train.micro_batch) == (2, torch.bfloat16, 32), "as on a GPU"
    peaks = [costs.memory(n)["peak"] for n in (1, 2, 4, 8, 16, 32)]
    assert peaks == sorted(peaks) and costs.largest_micro_batch(peaks[3]) == 8
    assert costs.largest_micro_batch(peaks[3] - 1) == 4 and costs.largest_micro_batch(1e6) is None
    parts = step_time(costs, 0.5)
    assert f"{sum(parts.values()) * 1e3:.1f} ms" in printed and "projected, products at 0.5" in printed
    assert "162,354,816" in printed and "1,703,936,000" in printed
    assert plan.main(["experiment=smoke", "--device", "cpu", "--ranks", "2"]) == 0
    assert "GPU-hours" not in capsys.readouterr().out


def test_the_time_of_an_update_is_that_of_its_parts():
    """GPT-2 124M by hand: 6 FLOPs a weight in products, causal attention with the scores once more, one pass of 34
    bytes a token, layer and dimension, and what travels hidden but for a unit's part."""
    one, eight = (Costs([], "h100", ranks) for ranks in (1, 8))
    parts, shared = step_time(one, 0.5), step_time(eight, 0.5)
    weights = 12 * 12 * 768**2 + 50257 * 768
    assert parts["products"] == pytest.approx(6 * weights * 524288 / (0.5 * 989e12))
    assert parts["attention"] == pytest.approx(7 / 12 * 12 * 12 * 768 * 1024 * 524288 / (ATTENTION * 989e12))
    assert parts["activations"] == pytest.approx(TOUCHED * 34 * 12 * 768 * 524288 / (3.35e12 * STREAMED))
    assert parts["travel"] == parts["exchange"] == 0
    for part in ("products", "attention", "activations", "logits"):
        assert shared[part] == pytest.approx(parts[part] / 8)
    sent, calls = eight.model_traffic()
    assert shared["travel"] == pytest.approx((sent / (450e9 * SENT) + calls.total() * 7 * HOP) / 13)
    assert step_time(eight, 0.6)["products"] < shared["products"]
    crowded = step_time(Costs(["train.batch_tokens=1048576"], "h100", 1024), 0.6)
    assert crowded["travel"] > crowded["products"], "a thousand ranks with a sequence each wait for the network"


def test_a_thousand_ranks(monkeypatch, tmp_path):
    """Nothing is started, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    costs = Costs(["train.micro_batch=1", "train.batch_tokens=1048576"], "h100", 1024)
    sent, _ = costs.exchange_traffic()
    assert len(sent) == len(costs.state_bytes) == 1024 and not dist.is_initialized() and not os.listdir()
    rows = sum(numel(plan_.region(i, r)) for plan_, _ in costs.exchanges for i in range(72) for r in range(1024))
    assert rows == 12 * 12 * 768**2


@pytest.mark.parametrize("words, named", [
    (["experiment=smoke", "train.stepz=3"], ["train.stepz", "train.steps"]),
    (["experiment=smoke", "optim=muonn"], ["muonn", "muon"]),
    (["experiment=smoke", "--ranks", "7"], ["train.batch_tokens=3072", "7 ranks", "nearest"]),
    (["experiment=smoke", "--ranks", "0"], ["--ranks 0", "at least 1"]),
    (["experiment=smoke", "--ranks", "2", "parallel=single"], ["parallel.mode=single", "fsdp"]),
])  # fmt: skip
def test_errors_are_one_line(words, named, capsys):
    assert plan.main(words) == 1
    printed = capsys.readouterr()
    assert not printed.out
    check_names(printed.err.strip(), *named)
