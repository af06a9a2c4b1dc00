"""SOAP-Muon against track 3's records #44 and #46, whole and sharded; Adam without bias correction."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from optim.soap_muon import SOAPMuon
from optim.uncorrected_adam import UncorrectedAdam
from tests.optim.reference import seeded
from tests.optim.threads import run_threads
from trainer.language_model import init_tensor

GOLDEN = json.loads((Path(__file__).parents[1] / "trainer/data/track3_unit_soap_muon.json").read_text())
RULES = {"44": dict(floor_rows=False, cautious_decay=0.0), "46": dict()}
SHAPE = torch.Size((8, 8))


@pytest.fixture
def in_float64():
    """The figures' draws were made with it as the default dtype, in which normal_ gives other values."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def signal(name, t):
    steady = init_tensor(f"{name}.signal", SHAPE, 0, 0.0, 1.0)
    return steady * (1 - 0.05 * t) + 0.5 * init_tensor(f"{name}.{t}", SHAPE, 0, 0.0, 1.0)


def gate(t):
    """(floor, cap) of the gate at step t, the records' with the file's steps."""
    held, ended = GOLDEN["gate_steps"]
    floor = 0.45 if t < held else 0.45 * max(0.0, ended - t) / (ended - held)
    return floor, 0.85 if t < ended else 1.0


@pytest.mark.parametrize("case", [key for key in GOLDEN if key[:2] in RULES])
def test_it_is_the_records_own_optimizer(case, in_float64):
    """Four 8 x 8 matrices, 24 steps, full-rank gradients: norms after every step, and the last weights."""
    weights = []
    for name in GOLDEN["names"]:
        drawn = "proj" not in name or "drawn" in case
        weights.append(nn.Parameter(init_tensor(name, SHAPE, 0, 0.0, 0.2 if drawn else 0.0)))
    blends = ["gated" if "attn.proj" in n else "kept" if "attn" in n else "none" for n in GOLDEN["names"]]
    groups = [{"params": [w], "blend": blend} for w, blend in zip(weights, blends, strict=True)]
    optimizer = SOAPMuon(groups, **RULES[case[:2]])
    for t, (lr, momentum) in enumerate(zip(GOLDEN["lr"], GOLDEN["mu"], strict=True)):
        for group in optimizer.param_groups:
            group.update(lr=lr, momentum=momentum, gate_floor=gate(t)[0], gate_cap=gate(t)[1])
        for name, weight in zip(GOLDEN["names"], weights, strict=True):
            weight.grad = signal(name, t)
        optimizer.step()
        assert [w.norm().item() for w in weights] == pytest.approx(GOLDEN[case]["norms"][t], rel=1e-12), t
    for name, weight in zip(GOLDEN["names"], weights, strict=True):
        expected = torch.tensor(GOLDEN[case]["final"][name], dtype=torch.float64)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-13)


SHAPES = [(5, 7), (12, 4), (6, 6), (1, 5)]


def train(place, steps=40, **engine):
    weights = [nn.Parameter(place(seeded(shape, 0, i, dtype=torch.float64))) for i, shape in enumerate(SHAPES)]
    groups = [{"params": [w], "blend": b} for w, b in zip(weights, ("gated", "kept", "none", "none"), strict=True)]
    optimizer = SOAPMuon(groups, lr=0.02, **engine)
    for step in range(steps):
        for i, weight in enumerate(weights):
            steady = seeded(weight.shape, 99, i, dtype=torch.float64)
            weight.grad = place(steady + 0.5 * seeded(weight.shape, 1 + step, i, dtype=torch.float64))
        optimizer.step()
    return [(w.full_tensor() if isinstance(w, DTensor) else w).detach() for w in weights]


@pytest.mark.parametrize(("world_size", "settings"), [(2, {"floor_rows": False, "floor": 0.6}), (3, {})])
def test_sharded_it_is_the_same(world_size, settings):
    def on_rank(rank):
        mesh = init_device_mesh("cpu", (world_size,))
        whole = train(lambda full: full, process_group=mesh.get_group(), **settings)
        return whole, train(lambda full: distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None), **settings)

    wanted = train(lambda full: full, **settings)
    for results in run_threads(world_size, on_rank):
        for weights in results:
            for got, want in zip(weights, wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_uncorrected_adam_is_its_formula():
    weight = nn.Parameter(seeded((3, 4), 0, dtype=torch.float64))
    optimizer, expected = UncorrectedAdam([weight], lr=0.1, betas=(0.8, 0.9), eps=1e-3), weight.detach().clone()
    m = v = torch.zeros(3, 4, dtype=torch.float64)
    for step in range(5):
        weight.grad = g = seeded((3, 4), 1 + step, dtype=torch.float64)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        expected = expected - 0.1 * m / (v.sqrt() + 1e-3)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-14, atol=1e-14)
