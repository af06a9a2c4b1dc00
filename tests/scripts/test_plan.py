"""A plan says what a run then has and does: the same parameters, states, bytes and collectives, for any ranks."""

import os
import re
import runpy
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from optim.matrix import local
from optim.named_state import named_tensors
from optim.plan import numel
from scripts import plan
from scripts.benchmark_traffic import Traffic
from scripts.plan import Costs
from tests.errors import check_names
from tests.runs import ROOT, SHORT, TINY, read_record
from tests.scripts.fake_ranks import as_rank, costs_of

sys.path.insert(0, str(ROOT / "scripts"))
from planning import scale  # noqa: E402
from planning.step import ATTENTION, HOP, SENT, STREAMED, TOUCHED, step_time  # noqa: E402

CALLS = {"alltoall_base_": "all_to_all", "broadcast_": "broadcast", "_allgather_base_": "all_gather",
         "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}  # fmt: skip


class Sent(Traffic):
    """Beside Traffic's all_to_all: what a rank sends in rings when weights are gathered and gradients reduced."""

    def __init__(self, rank: int, ranks: int, copies: int):
        super().__init__(rank)
        self.ranks, self.copies, self.in_rings, self.broadcast = ranks, copies, 0.0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "c10d::_allgather_base_":
            self.in_rings += args[1].nbytes * (self.ranks - 1)
        elif name == "c10d::_reduce_scatter_base_":
            self.in_rings += args[1].nbytes * (self.ranks - 1) / self.ranks
        elif name == "c10d::allreduce_":
            self.in_rings += 2 * args[0][0].nbytes * (self.copies - 1) / self.copies
        elif name == "c10d::broadcast_":
            self.broadcast += args[0][0].nbytes if args[2] == self.rank else 0
        return super().__torch_dispatch__(func, types, args, kwargs)


def real(costs: Costs, rank: int) -> SimpleNamespace:
    """What that rank holds, sends and computes in an update."""
    ddp, counting = costs.mode == "ddp", FlopCounterMode(display=False)
    with as_rank(costs, rank) as found, sdpa_kernel(SDPBackend.MATH):  # a fused backward pass makes the scores again
        for _ in range(2 * ddp):  # whose first two updates agree on buckets
            found.forward_backward()
        with Sent(rank % costs.shards, costs.shards, costs.ranks // costs.shards) as passes, counting:
            found.forward_backward()
        model = counting.get_total_flops()
        parameters = list(found.model.parameters())
        weights, gradients = (sum(local(t).nbytes for t in of) for of in (parameters, [p.grad for p in parameters]))
        with Sent(rank if ddp else rank % costs.shards, costs.group, 1) as steps, counting:
            found.optimizers.step()
        states = [state for member in found.optimizers.members.values() for state in member.state.values()]
        state = sum(local(t).nbytes for s in states for t in s.values() if isinstance(t, torch.Tensor))
    return SimpleNamespace(state=state, weights=weights, gradients=gradients, passes=passes, steps=steps,
                           model=model, rules=counting.get_total_flops())  # fmt: skip


pytestmark = pytest.mark.usefixtures("filled")


def calls(counter: Counter) -> dict[str, int]:
    return {CALLS[name]: count for name, count in counter.items() if name in CALLS}


def planned(counter: Counter) -> dict[str, int]:
    return {name.removesuffix(" of 16 bytes"): count for name, count in counter.items()}


CASES = [(1, "single", "muon"), (2, "fsdp", "muon"), (3, "ddp", "muon"), (4, "hsdp", "soap optim.matrix.share=always")]
MORE = [
    (2, "ddp", "shampoo"), (4, "ddp", "normuon"), (3, "fsdp", "track3/muon"), (4, "fsdp", "soap"), (4, "hsdp", "muon"),
    (2, "fsdp", "muon train.micro_batch=12"), (4, "hsdp", "normuon train.micro_batch=6"),  # all in one pass
    (3, "fsdp", "muon train.dtype=bfloat16"), (4, "ddp", "adamw"),
    (1024, "fsdp", "muon train.micro_batch=1 train.batch_tokens=16384"),
]  # fmt: skip


@pytest.mark.parametrize(
    "ranks, parallel, optim", [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_every_rank_holds_sends_and_computes_what_was_planned(ranks, parallel, optim):
    costs = costs_of([*TINY, f"parallel={parallel}", "model.n_layer=2", "train.micro_batch=2", "train.dtype=float32",
                      *f"optim={optim}".split()], "cpu", ranks)  # fmt: skip
    memory, (sent, exchange) = costs.memory(costs.train.micro_batch), costs.exchange_traffic()
    (in_rings, collectives), (model_flops, _, _) = costs.model_traffic(), costs.flops()
    elements = sum(spec.numel for found, _ in costs.exchanges for spec in found.specs)
    assert costs.shared == ("always" in optim)
    if costs.sharded and ranks in (2, 4) and not costs.shared and "bfloat16" not in optim:
        shards = costs.shards  # which are even then: 2 b S (W-1)/W^2
        assert sum(sent) / shards == pytest.approx(2 * 4 * elements * (shards - 1) / shards**2, rel=1e-12)
    padding = 6 * (costs.model.padded_vocab - costs.model.vocab_size) * costs.config.model.n_embd
    tokens = costs.train.batch_tokens
    # DTensor's caches keep the first copy's groups
    for rank in range(costs.shards if costs.shared else costs.group) if ranks < 1024 else (0, 7, 1023):
        found = real(costs, rank)
        assert found.state == costs.state_bytes[rank]
        assert (found.steps.broadcast if parallel == "ddp" else found.steps.sent) == sent[rank]
        assert calls(found.steps.calls) == planned(exchange)
        assert found.passes.in_rings == pytest.approx(in_rings, rel=1e-12)
        assert calls(found.passes.calls) == planned(collectives)
        assert found.model * ranks == model_flops + padding * tokens
        if "shampoo" not in optim and "soap" not in optim:  # of eigh and QR the counter knows nothing
            assert found.rules == costs.rule_flops[rank]
        if rank == 0:
            assert (found.weights, found.gradients) == (memory["weights"], memory["gradients"])


def test_one_process(run, tmp_path):
    trainer = run("run", "optim=soap", "average.blend=0.5")
    costs = costs_of([*SHORT, "optim=soap", "average.blend=0.5"], "cpu", 1)
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
        return costs_of([*TINY, "model.n_layer=4", "train.dtype=float32", *words], "cpu", ranks).flops()

    alone, fsdp, hsdp = flops(1), flops(4, "parallel=fsdp"), flops(4, "parallel=hsdp")
    assert alone[0] == fsdp[0] == hsdp[0] and alone[1] == alone[2] == fsdp[1] == hsdp[1] / 2
    assert alone[2] / 4 <= fsdp[2] <= alone[2] / 3 and hsdp[2] == pytest.approx(alone[2] / 2, rel=0.1)
    assert flops(4, "parallel=hsdp", "optim.matrix.share=always") == fsdp


def test_what_fits_and_what_is_projected(capsys):
    """By hand for a rank of 64 sequences: more do not fit where less memory is left, and time is work over speed."""
    words = ["experiment=track3", "model.n_layer=2"]
    assert plan.main([*words, "--device", "h100", "--ranks", "8", "--efficiency", "0.5"]) == 0
    printed = capsys.readouterr().out
    costs = costs_of(words, "h100", 8)
    assert (costs.width, costs.exchanges[0][1], costs.train.micro_batch) == (2, torch.bfloat16, 64), "as on a GPU"
    peaks = [costs.memory(n)["peak"] for n in (1, 2, 4, 8, 16, 32)]
    assert peaks == sorted(peaks) and costs.largest_micro_batch(peaks[3]) == 8
    assert costs.largest_micro_batch(peaks[3] - 1) == 4 and costs.largest_micro_batch(1e6) is None
    parts = step_time(costs, 0.5)
    assert f"{sum(parts.values()) * 1e3:.1f} ms" in printed and "projected, products at 0.5" in printed
    assert f"{sum(p.numel() for p in costs.model.parameters()):,}" in printed and "1,703,936,000" in printed
    assert plan.main(["experiment=smoke", "--device", "cpu", "--ranks", "2"]) == 0
    assert "GPU-hours" not in capsys.readouterr().out


def test_the_time_of_an_update_is_that_of_its_parts():
    """GPT-2 124M by hand: 6 FLOPs a weight in products, causal attention with the scores once more, one pass of 34
    bytes a token, layer and dimension, and what travels hidden but for a unit's part."""
    one, eight = (costs_of([], "h100", ranks) for ranks in (1, 8))
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
    table = re.findall(r"^\| ([a-z, ]+) " + 3 * r"\| ([\d.,]+) ", (ROOT / "docs/performance.md").read_text(), re.M)
    in_the_docs = {part: times for part, *times in table}
    for column, costs in enumerate((one, eight, costs_of([], "h100", 64))):
        for part, seconds in step_time(costs, 0.6).items():
            assert in_the_docs[part][column] == f"{seconds * 1e3:,.1f}"
    crowded = step_time(costs_of(["train.batch_tokens=1048576"], "h100", 1024), 0.6)
    assert crowded["travel"] > crowded["products"], "a thousand ranks with a sequence each wait for the network"


def test_a_thousand_ranks(monkeypatch, tmp_path):
    """Nothing is started, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    costs = costs_of(["model.n_layer=2", "train.micro_batch=1", "train.batch_tokens=1048576"], "h100", 1024)
    sent, _ = costs.exchange_traffic()
    assert len(sent) == len(costs.state_bytes) == 1024 and not dist.is_initialized() and not os.listdir()
    rows = sum(numel(plan_.region(i, r)) for plan_, _ in costs.exchanges for i in range(12) for r in range(1024))
    assert rows == 2 * 12 * 768**2


def test_both_forms_say_the_same(monkeypatch, capsys, tmp_path):
    """A table and a picture; ranks that cannot share the batch say why."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scale, "RANKS", (8, 16))
    printed = []
    words = "plan=true plan.device=h100 plan.scale=true"
    for form, options in (("scripts/plan.py", "--device h100 --scale"), ("train.py", words)):
        monkeypatch.setattr(sys, "argv", [form, *TINY, "train.dtype=auto", *options.split()])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / form), run_name="__main__")
        assert ended.value.code == 0 and os.listdir() == ["plan.png"]
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    title, head, eight, sixteen, last = printed[0].splitlines()
    assert "h100" in title and "tokens/s" in head and "plan.png" in last
    assert eight.split()[:5] == ["8", "fsdp", "1", "x", "3"] and "train.batch_tokens=384" in sixteen


def test_a_run_beside_its_plan(run, tmp_path, capsys):
    """Its directory is read, and can run no code."""
    trainer, folder = run("run", "checkpoint.every=3"), tmp_path / "run"
    capsys.readouterr()
    assert plan.main([str(folder)]) == 0
    lines = capsys.readouterr().out.split("beside it")[1].splitlines()
    found = {line[:20].strip(): line[20:].split() for line in lines}
    assert found["updates"] == ["6", "6", "1.000"] and found["evaluations"] == ["3", "3", "1.000"]
    assert found["an update"][0] == "-" and found["an update"][2:] == ["ms", "-"]
    size, unit = found["peak memory"][2:4]
    assert size == f"{read_record(folder)[-1]['perf/peak_memory_bytes'] / {'MB': 1e6, 'GB': 1e9}[unit]:.2f}"
    saved = sum(file.stat().st_size for file in (trainer.checkpoints.folder / "step_00000006").iterdir())
    assert found["a checkpoint"][2:4] == [f"{saved / 1e3:.2f}", "kB"]
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("trainer.model.GPT", "tests.trainer.no_logits.NoLogits"))
    assert plan.main([str(folder)]) == 1
    check_names(capsys.readouterr().err.strip(), "NoLogits", "KEY=VALUE")


@pytest.mark.parametrize("words, named", [
    (["experiment=smoke", "train.stepz=3"], ["train.stepz", "train.steps"]),
    (["experiment=smoke", "optim=muonn"], ["muonn", "muon"]),
    (["experiment=smoke", "--ranks", "7"], ["train.batch_tokens=3072", "7 ranks", "nearest"]),
    (["experiment=smoke", "--ranks", "0"], ["--ranks 0", "at least 1"]),
    (["experiment=smoke", "plan.ranks=0"], ["--ranks 0", "at least 1"]),
    (["experiment=smoke", "--ranks", "2", "parallel=single"], ["parallel.mode=single", "fsdp"]),
    (["experiment=smoke", "plan=false"], ["plan=false", "leave it out"]),
    (["nowhere"], ["nowhere", "KEY=VALUE"]),
    (["nowhere", "experiment=smoke"], ["nowhere", "alone"]),
])  # fmt: skip
def test_errors_are_one_line(words, named, capsys):
    assert plan.main(words) == 1
    printed = capsys.readouterr()
    assert not printed.out
    check_names(printed.err.strip(), *named)
