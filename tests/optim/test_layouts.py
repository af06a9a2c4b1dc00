"""Sharded = whole over drawn meshes and placements: tensor parallelism, FSDP2 x TP, experts, replicas of them all."""

import math
import os
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Partial, _StridedShard

import optim
from tests.errors import raises_naming
from tests.optim.counting import assert_as_planned, counted, counting
from tests.optim.reference import seeded
from tests.optim.rules import with_all_rules
from tests.optim.test_measure import Floored
from tests.optim.test_sharded_law import RULES as DAMPED
from tests.optim.threads import run_threads


class BySquares(optim.Muon):
    """A step as long as ||W||^2, which sums over more than one copy would change."""

    def measure(self, group, params, updates, states):
        return [w.square().sum()[None] for w in params]

    def apply(self, group, params, updates, scales, states, sums):
        for w, u, (w2,) in zip(params, updates, sums, strict=True):
            w.sub_(u * w2, alpha=group["lr"])


RULES = {
    "muon": (optim.Muon, dict(weight_decay=0.1, cautious=True)),
    "hyperball": (optim.Muon, dict(constraint="hyperball")),
    "rows": (Floored, {}),
    "squares": (BySquares, {}),
    "normuon": (optim.NorMuon, dict(scale="rms_to_rms")),
    "shampoo": (optim.Shampoo, dict(update_freq=2, eps=0.1)),
    "soap": (optim.SOAP, dict(update_freq=2, max_dim=0)),
}
EVERY_RULE = with_all_rules(DAMPED)
SUMS = {  # that a rule measures of every block or row: what is added up over ranks beside the exchange
    "hyperball": dict(of_blocks=3),
    "squares": dict(of_blocks=1),
    "rows": dict(of_rows=2),
    "dion2": dict(of_rows=1),
    "nordion2": dict(of_rows=1),
    "soapmuon": dict(of_rows=3, all_rows=True),
}
STEPS, SHARED = 3, ["always", "never"]
EXAMPLES = 100 if "NANOMUON_SOAK" in os.environ else 4


@st.composite
def cases(draw):
    """A mesh of up to three dimensions, and matrices, experts and kernels, each placed in its own way on it."""
    mesh = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda sizes: math.prod(sizes) <= 8))
    params = []
    for _ in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 6), min_size=2, max_size=4)))
        own = {"conv1d": draw(st.booleans())} if len(shape) < 4 else {}
        fan_out = shape[0] if len(shape) == 4 else shape[-1 if own["conv1d"] else -2]
        cut = draw(st.integers(0, fan_out))
        own["split"] = draw(st.sampled_from([1, fan_out, [cut, fan_out - cut] if 0 < cut < fan_out else 1]))
        dims = st.sampled_from([None, *range(len(shape))])
        params.append((shape, own, draw(st.lists(dims, min_size=len(mesh), max_size=len(mesh)))))
    share = draw(st.sampled_from(SHARED))
    return {"mesh": mesh, "params": params, "bucket_bytes": draw(st.integers(1, 3000)), "share": share}


FSDP_OF_TP = -1  # rows that tensor parallelism has cut, and then fully_shard, which takes what divides
# On a mesh of 2 x 3: the dimension that each of its two cuts. None: replicas, which share the work or repeat it.
PLACED = {
    2: [(0, None), (None, 0), (1, None), (None, 1), (0, 0), (0, 1), (1, 0), (None, None), (FSDP_OF_TP, 0)],
    3: [(0, None), (None, 0), (0, 1), (2, 0)],  # experts over 2 and over 3 ranks, and cut further
}


@st.composite
def placed(draw):
    """Matrices and experts of any sizes, one for every way in which the mesh can hold them."""
    params, sizes = [], st.sampled_from([5, 1, 2, 3, 4, 6])  # the first is what the simplest case is made of
    for ndim, ways in PLACED.items():
        for dims in ways:
            shape = tuple(draw(st.lists(sizes, min_size=ndim, max_size=ndim))) if FSDP_OF_TP not in dims else (6, 7)
            cut = draw(st.integers(0, shape[-2]))
            own = {"split": [cut, shape[-2] - cut] if 0 < cut < shape[-2] else 1}
            params.append((shape, own, dims))
    chosen = {"share": draw(st.sampled_from(SHARED)), "replicas": draw(st.sampled_from([0, 1]))}
    buckets = {"bucket_bytes": draw(st.sampled_from([10**6, 3000, 1])), "in_flight": draw(st.sampled_from([1, 2, 4]))}
    return {"params": params, **buckets, **chosen}


def at_full_rank(case):
    """Square blocks.  In a longer one the last vectors of SOAP-Muon's undamped bases hang on rounding for some steps,
    and so on how many matrices are computed together."""
    params = []
    for (*experts, rows, n), own, dims in case["params"]:
        blocks = 2 if own["split"] != 1 else 1
        params.append(((*experts, blocks * min(rows, n), min(rows, n)), {"split": blocks}, dims))
    return case | {"params": params}


def train(rule, case, place=lambda full, dims: full, counts=None, **engine):
    """The weights after STEPS steps.  Given ``counts``, what these sent and computed is that of the formulas."""
    cls, hyper = (EVERY_RULE | RULES)[rule]
    if counts is not None:
        cls = counted(cls, counts)
    weights = [
        nn.Parameter(place(seeded(shape, 0, i, dtype=torch.float64), dims))
        for i, (shape, _, dims) in enumerate(case["params"])
    ]
    groups = [{"params": [w], **own} for w, (_, own, _) in zip(weights, case["params"], strict=True)]
    optimizer = cls(groups, **hyper, **engine, bucket_bytes=case["bucket_bytes"], share=case.get("share", "auto"))
    for step in range(STEPS):
        for i, (weight, (shape, _, dims)) in enumerate(zip(weights, case["params"], strict=True)):
            weight.grad = place(seeded(shape, 1 + step, i, dtype=torch.float64), dims)
        optimizer.step()
    if counts is not None:
        assert_as_planned(optimizer, counts, STEPS, **SUMS.get(rule, {}))
    return [weight.detach() for weight in weights]


def on_mesh(mesh):
    def place(full, dims):
        if FSDP_OF_TP in dims:
            return fsdp_of_tp(full, mesh, 0)
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        return distribute_tensor(full, mesh, placements, src_data_rank=None)

    return place


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@example(case={"mesh": [2, 2], "params": [((4, 6), {}, [None, 0])], "bucket_bytes": 1000, "share": "always"})
@given(case=cases())
def test_any_placement_gives_the_weights_of_one_process(rule, case):
    expected = train(rule, case)

    def on_rank(rank):
        place = on_mesh(init_device_mesh("cpu", tuple(case["mesh"])))
        got = train(rule, case, place, counts)
        for weight, whole, (shape, _, dims) in zip(got, expected, case["params"], strict=True):
            want = place(whole, dims).to_local()
            assert (weight.to_local() - want).norm() <= 1e-10 * whole.norm(), (shape, dims)

    with counting() as counts:
        run_threads(math.prod(case["mesh"]), on_rank)


@pytest.mark.parametrize("rule", EVERY_RULE)
@settings(deadline=None, max_examples=EXAMPLES // 2, suppress_health_check=[HealthCheck.too_slow])
@given(case=placed())
def test_every_rule_in_every_placement_and_over_2_or_3_replicas(rule, case):
    """With any number of buckets in flight: with a single one nothing is computed while matrices travel."""
    if rule == "soapmuon":
        case = at_full_rank(case)
    expected = train(rule, case)

    def on_rank(rank):
        mesh = init_device_mesh("cpu", (2, 3))
        place = on_mesh(mesh)
        sharded = train(rule, case, place, counts)
        for got, whole, (shape, _, dims) in zip(sharded, expected, case["params"], strict=True):
            want = place(whole, dims).to_local()
            assert (got.to_local() - want).norm() <= 1e-12 * whole.norm(), (shape, dims)
        replicated = train(rule, case, counts=counts, process_group=mesh.get_group(case["replicas"]))
        for got, whole, (shape, *_) in zip(replicated, expected, case["params"], strict=True):
            assert (got - whole).norm() <= 1e-12 * whole.norm(), shape

    in_flight = [patch(f"optim.{module}.IN_FLIGHT", case["in_flight"]) for module in ("plan", "exchange")]
    with counting() as counts, in_flight[0], in_flight[1]:
        run_threads(6, on_rank)


def fsdp_of_tp(full, mesh, dim):
    """As fully_shard leaves what tensor parallelism has cut along ``dim`` before."""
    (fsdp, of_fsdp), (tp, of_tp) = ((mesh.get_local_rank(d), mesh.size(d)) for d in range(2))
    part = full.chunk(of_tp, dim)[tp].chunk(of_fsdp)[fsdp]
    placements = [_StridedShard(0, split_factor=of_tp), Shard(0)] if dim == 0 else [Shard(0), Shard(dim)]
    return DTensor.from_local(part, mesh, placements, shape=full.shape, stride=full.stride())


@pytest.mark.parametrize("rule", RULES)
def test_fsdp_over_tensor_parallelism(rule):
    case = {"params": [((8, 4), {}, 0), ((4, 8), {}, 1), ((12, 4), {"split": [6, 3, 3]}, 0)], "bucket_bytes": 500}
    expected = train(rule, case)

    def on_rank(rank):
        mesh = init_device_mesh("cpu", (2, 2))
        got = train(rule, case, lambda full, dim: fsdp_of_tp(full, mesh, dim), counts)
        for weight, whole, (*_, dim) in zip(got, expected, case["params"], strict=True):
            torch.testing.assert_close(weight.to_local(), fsdp_of_tp(whole, mesh, dim).to_local(), rtol=0, atol=1e-12)

    with counting() as counts:
        run_threads(4, on_rank)


def sent_and_owned(shape, mesh, dims, share="auto"):
    """By rank: elements sent to others and matrices preconditioned in one step."""

    def on_rank(rank):
        place = on_mesh(init_device_mesh("cpu", mesh))
        weight = nn.Parameter(place(seeded(shape, 0), dims))
        weight.grad = place(seeded(shape, 1), dims)
        optimizer = counted(optim.Muon, counts)([weight], share=share)
        optimizer.step()
        assert_as_planned(optimizer, counts)
        return counts[rank]["sent"], counts[rank]["matrices"]

    with counting() as counts:
        return run_threads(math.prod(mesh), on_rank)


@pytest.mark.parametrize(
    ("experts", "mesh", "dims", "expected"),
    [
        (6, (3,), [0], [(0, 2)] * 3),
        (5, (3,), [0], [(0, 2), (0, 2), (0, 1)]),
        (2, (3,), [0], [(0, 1), (0, 1), (0, 0)]),
        (6, (2, 2), [0, 0], [(0, 2), (0, 1), (0, 2), (0, 1)]),
        (4, (2, 2), [None, 0], [(0, 2)] * 4),
        (4, (2, 2), [0, 1], [(24, 2), (24, 0)] * 2),  # halves of 2 experts of 24 elements to the owner, and back
    ],
)
def test_experts_that_lie_whole_on_a_rank_stay_there(experts, mesh, dims, expected):
    assert sent_and_owned((experts, 4, 6), mesh, dims) == expected


@pytest.mark.parametrize("dims", [[1, None], [0, 1], [1, 0], [0, 0]])
def test_bytes_over_regions_are_those_of_the_formula(dims):
    sent = sent_and_owned((8, 4), (2, 2), dims)
    holders = 2 if None in dims else 4
    assert sum(elements for elements, _ in sent) == 4 // holders * 2 * 32 * (holders - 1) / holders


@pytest.mark.parametrize(
    ("mesh", "dims", "expected"),
    [
        # Halves of 32 elements: the owner gets the other half of its copy, and sends everyone theirs.
        ((2, 2), [None, 0], [(48, 1), (16, 0), (0, 0), (0, 0)]),
        ((2, 3), [1, None], [(80, 1), (0, 0), (0, 0), (16, 0), (0, 0), (0, 0)]),
        ((3,), [None], [(64, 1), (0, 0), (0, 0)]),
    ],
)
def test_replicas_that_share_the_work(mesh, dims, expected):
    """Each matrix once in all, instead of once a replica; its owner needs only its own copy."""
    assert sent_and_owned((8, 4), mesh, dims, "always") == expected
    alone = [owned for _, owned in sent_and_owned((8, 4), mesh, dims, "never")]
    assert sum(alone) == math.prod(size for size, dim in zip(mesh, dims, strict=True) if dim is None)


STATES = {
    "params": [((5, 3, 4), {}, [0, None]), ((4, 6, 2), {"split": 2}, [0, 1]), ((5, 3, 4), {}, [None, 0])]
    + [((2, 3, 4), {}, [0, 2]), ((1, 4, 3), {}, [0, 1]), ((6, 4), {"split": [3, 2, 1]}, [0, 1]), ((5, 3), {}, [1, 0])],
    "bucket_bytes": 1000,
}


def half_way(cls, place, states=None, share="auto"):
    """State after two steps, and the weights after a third; or the latter alone, from that state."""
    weights = [
        nn.Parameter(place(seeded(shape, 0, i).double(), dims)) for i, (shape, _, dims) in enumerate(STATES["params"])
    ]
    groups = [{"params": [w], **own} for w, (_, own, _) in zip(weights, STATES["params"], strict=True)]
    optimizer = cls(groups, share=share)
    if states is not None:
        optimizer.load_state_dict(states)
    kept = None
    for step in range(0 if states is None else 2, 3):
        if step == 2:
            kept = optimizer.state_dict()
            kept["state"] = {i: {k: v.clone() for k, v in state.items()} for i, state in kept["state"].items()}
        for i, (weight, (shape, _, dims)) in enumerate(zip(weights, STATES["params"], strict=True)):
            weight.grad = place(seeded(shape, 1 + step, i).double(), dims)
            if step == 2:  # whatever came before, so that only the state tells
                weight.copy_(place(seeded(shape, 9, i).double(), dims))
        optimizer.step()
    return kept, [weight.detach() for weight in weights]


@pytest.mark.parametrize(("cls", "share"), [(optim.NorMuon, "always"), (optim.Shampoo, "never")])
def test_state_dicts_of_any_layout_are_those_of_one_process(cls, share):
    def on_rank(rank):
        place = on_mesh(init_device_mesh("cpu", (2, 2)))
        state, weights = half_way(cls, place, share=share)
        for i, want in expected["state"].items():
            assert state["state"][i].keys() == want.keys()
            for key, value in want.items():
                torch.testing.assert_close(state["state"][i][key].full_tensor(), value, rtol=1e-10, atol=1e-10)
        _, resumed = half_way(cls, place, state, share)
        for got, again, whole, (*_, dims) in zip(weights, resumed, expected_weights, STATES["params"], strict=True):
            assert torch.equal(got.to_local(), again.to_local())
            torch.testing.assert_close(got.to_local(), place(whole, dims).to_local(), rtol=1e-10, atol=1e-10)

    with torch.no_grad():
        expected, expected_weights = half_way(cls, lambda full, dims: full)
        run_threads(4, torch.no_grad()(on_rank))


@pytest.mark.parametrize(
    ("shape", "placements", "words"),
    [((4, 4), [Partial()], ("Partial", "sharded or replicated")), ((2, 4, 2, 2), [Shard(1)], ("first dimension",))],
)
def test_what_is_no_rectangle_of_matrices_is_refused(shape, placements, words):
    def on_rank(rank):
        mesh = init_device_mesh("cpu", (2,))
        weight = nn.Parameter(DTensor.from_local(torch.ones(shape), mesh, placements))
        with raises_naming(ValueError, "weight", *words):
            optim.Muon([{"params": [("weight", weight)], "stack": True}])

    run_threads(2, on_rank)
