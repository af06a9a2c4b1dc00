"""Sharded = whole, as a law: any rule, shapes, ranks, dtypes, layout and buckets give one process's weights."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from optim import KLSOAP, SOAP, AdaMuon, Muon, NorMuon, Scion, Shampoo, Steepest
from tests.optim.reference import seeded
from tests.optim.rules import with_all_rules
from tests.optim.threads import run_threads

RULES = {
    "muon": (Muon, dict(weight_decay=0.1, cautious=True)),
    "normuon": (NorMuon, dict(statistics="longer", floor=1e-3)),  # rows of a tall matrix, columns of a wide one
    "scion": (Scion, dict(lr=0.1, norm="rms_to_inf")),
    "steepest": (Steepest, dict(momentum=0.5, form="regularised")),
    # A root or basis of a singular factor hangs on rounding, and so on how matrices are stacked: damped here.
    "shampoo": (Shampoo, dict(update_freq=2, eps=0.1, weight_decay=0.1)),
    "soap": (SOAP, dict(update_freq=2, max_dim=0)),
    "kl_soap": (KLSOAP, dict(update_freq=2, max_dim=0)),
    "adamuon": (AdaMuon, dict(eps=0.1)),  # an entry of the polar factor that should be 0 is rounding, made large
}
RULES = with_all_rules(RULES)
del RULES["soapmuon"]  # undamped bases: tests/optim/test_soap_muon.py has it, in float64 and at full rank
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.05}
STEPS = 3
EXAMPLES = 40 if "NANOMUON_SOAK" in os.environ else 5  # for each of 70 pairs of a rule and a layout


@st.composite
def cases(draw):
    """Shapes with equal and transposed ones among them, expert stacks too; dtypes may be mixed in a bucket; some
    parameters, or all of them, skip a step."""
    sizes = st.integers(1, 7)
    shape = st.one_of(st.tuples(sizes, sizes), st.tuples(st.integers(1, 4), sizes, sizes))
    shapes = draw(st.lists(shape, min_size=1, max_size=6))
    shapes += [s[:-2] + s[:-3:-1] for s in draw(st.lists(st.sampled_from(shapes), max_size=2))]
    return {
        "shapes": shapes,
        "skipped": draw(st.sets(st.integers(0, len(shapes) - 1))),
        "dtypes": draw(
            st.one_of(
                st.sampled_from(list(TOLERANCES)).map(lambda dtype: [dtype] * len(shapes)),
                st.lists(st.sampled_from(list(TOLERANCES)), min_size=len(shapes), max_size=len(shapes)),
            )
        ),
        "bucket_bytes": draw(st.integers(1, 3000)),
        "comm_dtype": draw(st.sampled_from([None, torch.bfloat16])),
        "share": draw(st.sampled_from(["always", "never"])),
    }


def train(rule, case, place=lambda full: full, **engine):
    cls, hyper = RULES[rule]
    kinds = list(enumerate(zip(case["shapes"], case["dtypes"], strict=True)))
    weights = [nn.Parameter(place(seeded(s, 0, i, dtype=torch.float64).to(dtype))) for i, (s, dtype) in kinds]
    settings = {key: case[key] for key in ("bucket_bytes", "comm_dtype", "share")}
    optimizer = cls(weights, **hyper, **settings, **engine)
    for step in range(STEPS):
        for (i, (s, dtype)), weight in zip(kinds, weights, strict=True):
            full = place(seeded(s, 1 + step, i, dtype=torch.float64).to(dtype))
            weight.grad = None if step == 1 and i in case["skipped"] else full
        kept = [None if w.grad is None else whole(w.grad).clone() for w in weights]
        optimizer.step()
        assert all(g is None or torch.equal(whole(w.grad), g) for w, g in zip(weights, kept, strict=True)), "gradients"
    return [whole(w).double() for w in weights]


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


@pytest.mark.parametrize("layout", ["sharded", "hybrid", "replicated"])
@pytest.mark.parametrize("rule", list(RULES))
@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), world_size=st.integers(1, 5))
def test_any_sharding_gives_the_weights_of_one_process(rule, layout, case, world_size):
    """Sharded; sharded in each of two groups; replicated in each of two groups, where a rank has two numbers."""

    def on_rank(rank):
        if layout == "sharded":
            mesh = init_device_mesh("cpu", (world_size,))
            return train(rule, case, lambda full: distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None))
        mesh = init_device_mesh("cpu", (2, world_size), mesh_dim_names=("replicate", "shard"))
        if layout == "replicated":
            return train(rule, case, process_group=mesh.get_group("shard"))
        placements = [Replicate(), Shard(0)]
        return train(rule, case, lambda full: distribute_tensor(full, mesh, placements, src_data_rank=None))

    expected = train(rule, case)
    for got in run_threads(world_size * (1 if layout == "sharded" else 2), on_rank):
        for shape, dtype, a, b in zip(case["shapes"], case["dtypes"], got, expected, strict=True):
            assert (a - b).norm() <= TOLERANCES[case["comm_dtype"] or dtype] * b.norm(), shape
