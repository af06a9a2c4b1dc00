"""Sharded = whole, as a law: any rule, shapes, number of ranks, dtype, layout and bucket give one process's weights."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from optim import SOAP, Muon, NorMuon, Scion, Shampoo, Steepest
from tests.optim.reference import seeded
from tests.optim.threads import run_threads

RULES = {
    "muon": (Muon, dict(weight_decay=0.1, cautious=True)),
    "normuon": (NorMuon, dict()),
    "scion": (Scion, dict(lr=0.1, norm="rms_to_inf")),
    "steepest": (Steepest, dict(momentum=0.5, form="regularised")),
    # A root or basis of a singular factor hangs on rounding, and so on how matrices are stacked: damped here.
    "shampoo": (Shampoo, dict(every=2, eps=0.1, weight_decay=0.1)),
    "soap": (SOAP, dict(every=2, max_dim=0)),
}
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.05}
STEPS = 3


@st.composite
def cases(draw):
    """Shapes with equal and transposed ones among them, expert stacks too; some parameters skip a step."""
    sizes = st.integers(1, 7)
    shape = st.one_of(st.tuples(sizes, sizes), st.tuples(st.integers(1, 4), sizes, sizes))
    shapes = draw(st.lists(shape, min_size=1, max_size=6))
    shapes += [s[:-2] + s[:-3:-1] for s in draw(st.lists(st.sampled_from(shapes), max_size=2))]
    return {
        "shapes": shapes,
        "skipped": draw(st.sets(st.integers(0, len(shapes) - 1))),
        "dtype": draw(st.sampled_from(list(TOLERANCES))),
        "bucket_bytes": draw(st.integers(1, 3000)),
    }


def train(rule, case, place=lambda full: full, **engine):
    cls, hyper = RULES[rule]
    shapes = list(enumerate(case["shapes"]))
    weights = [nn.Parameter(place(seeded(s, 0, i, dtype=torch.float64).to(case["dtype"]))) for i, s in shapes]
    optimizer = cls(weights, **hyper, bucket_bytes=case["bucket_bytes"], **engine)
    for step in range(STEPS):
        for (i, s), weight in zip(shapes, weights, strict=True):
            full = seeded(s, 1 + step, i, dtype=torch.float64).to(case["dtype"])
            weight.grad = None if step == 1 and i in case["skipped"] else place(full)
        optimizer.step()
    return [(w.full_tensor() if isinstance(w, DTensor) else w).detach().double() for w in weights]


@pytest.mark.parametrize("layout", ["sharded", "hybrid", "replicated"])
@pytest.mark.parametrize("rule", list(RULES))
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), world_size=st.integers(1, 5))
def test_any_sharding_gives_the_weights_of_one_process(rule, layout, case, world_size):
    def on_rank(rank):
        if layout == "replicated":
            return train(rule, case, process_group=dist.group.WORLD)
        if layout == "hybrid":
            mesh = init_device_mesh("cpu", (2, world_size), mesh_dim_names=("replicate", "shard"))
            return train(rule, case, lambda full: distribute_tensor(full, mesh, [Replicate(), Shard(0)]))
        mesh = init_device_mesh("cpu", (world_size,))
        return train(rule, case, lambda full: distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None))

    expected = train(rule, case)
    for got in run_threads(world_size * (2 if layout == "hybrid" else 1), on_rank):
        for shape, a, b in zip(case["shapes"], got, expected, strict=True):
            assert (a - b).norm() <= TOLERANCES[case["dtype"]] * b.norm(), shape
