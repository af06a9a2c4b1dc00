"""A step's transient memory: at most two bucket_bytes in all, the rule's workspace included."""

import math
import statistics
import time

import pytest
import torch
import torch.distributed as dist

import optim
from optim import MatrixOptimizer
from scripts.planning.live_bytes import LiveBytes
from tests.distributed.harness import run_workers
from tests.distributed.hooks import around
from tests.distributed.matrices import gradient, sharded
from tests.distributed.test_rules import RULES

pytestmark = pytest.mark.slow
SHAPES = [(48, 16), (16, 16), (64, 16), (16, 64)] * 24


class Half(MatrixOptimizer):
    """The cheapest rule: what is allocated is the engine's."""

    def flops(self, group, shape, dtype):
        return float(shape[0] * shape[1])

    def workspace(self, group, shape, dtype):
        return 0.0

    def precondition(self, group, stack, state):
        return stack.mul_(0.5)


HALF = {"dtype": torch.bfloat16}
CAUTIOUS = HALF | {"cautious": True, "weight_decay": 0.1}
CASES = RULES | {
    "half": (Half, {"defaults": {"lr": 0.1}}),
    "muon": (optim.Muon, {}),
    "muon_comm_dtype": (optim.Muon, {"comm_dtype": torch.bfloat16}),
    "muon_bfloat16": (optim.Muon, HALF),
    "muon_cautious": (optim.Muon, CAUTIOUS),
}


class Settled:
    """A transfer that is over when its wait is: gloo's own thread lets go of the buffers a moment later."""

    def __init__(self, work):
        self.work = work

    def wait(self):
        self.work.wait()
        time.sleep(0.005)


def settle(name):
    @around(dist, name)
    def transfer(original, *args, **kwargs):
        return Settled(original(*args, **kwargs))


def room_for(exchange, elements):
    """The least bucket_bytes that give an owner this many elements, and every item its share."""
    buffers = 6 * exchange.comm_dtype.itemsize * (exchange.plan.world_size if exchange.layout == "replicated" else 1)
    usual = statistics.median(spec.workspace / spec.numel for spec in exchange.plan.specs)
    elements = max(elements, *(spec.workspace / usual for spec in exchange.plan.specs))
    return math.ceil((buffers + usual) * elements / 2)


def measure(rank, world_size, layout, matrices):
    """The most that one step allocates at once, of each rule: (bytes / bucket_bytes, buckets).

    bucket_bytes lets an owner hold this number of the largest matrix, and the one that is hardest to compute."""
    model, group = sharded(SHAPES, layout, world_size)
    for name in ("all_to_all_single", "broadcast"):
        settle(name)
    measured = {}
    for name, (rule, settings) in CASES.items():
        exchange = rule(model.parameters(), **settings, process_group=group)._layouts[0].exchange
        bucket_bytes = room_for(exchange, 64 * 16 * matrices)
        optimizer = rule(model.parameters(), **settings, process_group=group, bucket_bytes=bucket_bytes)
        for i, param in enumerate(model.weights):
            param.grad = gradient(param, 0, i)
        optimizer.step()
        with LiveBytes() as live:
            optimizer.step()
        buckets = optimizer._layouts[0].exchange.plan.buckets(range(len(SHAPES)))
        measured[name] = live.peak / bucket_bytes, len(buckets)
    return measured


@pytest.mark.parametrize(("layout", "world_size"), [("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("ddp", 2), ("ddp", 4)])
def test_transient_memory(tmp_path, layout, world_size):
    ranks = run_workers(measure, world_size, tmp_path, layout=layout, matrices=4)
    for name in CASES:
        peaks, buckets = zip(*(measured[name] for measured in ranks), strict=True)
        assert min(buckets) > 3, "too few buckets to fill the pipeline"
        assert max(peaks) <= 2.0, f"{name} allocates {max(peaks):.2f} bucket_bytes"
        if layout == "fsdp" and world_size > 1 and name in ("half", "muon", "muon_comm_dtype", "muon_bfloat16"):
            assert max(peaks) >= 1.4, f"{name} uses {max(peaks):.2f} bucket_bytes of 2"


ALONE = {  # rule, its settings, the parameters' dtype, groups of (shapes, settings of the group)
    "float64": (optim.Muon, CAUTIOUS, torch.float64, [([(16, 64)] * 12, {})]),
    "float64 sent as bfloat16": (optim.NorMuon, {"comm_dtype": torch.bfloat16}, torch.float64, [([(16, 64)] * 12, {})]),
    "cautious": (optim.Muon, CAUTIOUS, torch.float32, [([(2, 512)] * 12, {})]),
    "split": (optim.Muon, CAUTIOUS, torch.float32, [([(24, 96), (96, 24)] * 6, {"split": 2})]),
    "mixed": (
        optim.Muon, HALF, torch.float32,
        [([(16, 216), (2, 1728)] * 4, {"polar": "cubic"}), ([(32, 32)] * 8, {"polar": "eigh"})],
    ),
    "experts": (optim.SOAP, {}, torch.float32, [([(4, 16, 32), (2, 48, 24)] * 6, {})]),
    "outlier": (optim.SOAP, {"update_freq": 1}, torch.float32, [([(64, 64)] * 20 + [(1, 256)], {})]),
}  # fmt: skip


@pytest.mark.parametrize("matrices", [1, 3])
@pytest.mark.parametrize("case", ALONE)
def test_transient_memory_of_one_process(case, matrices):
    rule, settings, dtype, groups = ALONE[case]
    groups = [
        {"params": [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes], **own}
        for shapes, own in groups
    ]
    weights = [weight for group in groups for weight in group["params"]]
    exchange = rule([dict(group) for group in groups], **settings)._layouts[0].exchange
    bucket_bytes = room_for(exchange, matrices * max(weight.numel() for weight in weights))
    optimizer = rule(groups, **settings, bucket_bytes=bucket_bytes)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    for _ in range(3):
        with LiveBytes() as live:
            optimizer.step()
        assert live.peak <= 2 * bucket_bytes, f"{live.peak / bucket_bytes:.2f} bucket_bytes"
