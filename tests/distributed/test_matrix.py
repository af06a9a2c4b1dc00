"""Sharded = whole: every layout and world size gives the update of a plain single-process loop."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from optim import Muon
from optim.polar import polar
from tests.distributed.harness import run_workers
from tests.distributed.matrices import Matrices, cut, gradient, mesh_of, sharded, whole
from tests.optim.reference import AWKWARD, STACKED, plain_muon, seeded

pytestmark = pytest.mark.slow
STEPS = 4
FEW = [(6, 4)]  # fewer matrices than ranks
SPLIT = [(12, 8), (8, 12), (5, 6, 4)]


def train(shapes, layout, world_size, bucket_bytes=2**20, skip=(), **settings):
    """Take STEPS steps; parameters in ``skip`` get no gradient at step 2.  Returns the whole weights."""
    model, group = sharded(shapes, layout, world_size)
    optimizer = Muon(model.named_parameters(), process_group=group, bucket_bytes=bucket_bytes, **settings)
    for step in range(STEPS):
        for i, param in enumerate(model.weights):
            param.grad = None if step == 2 and i in skip else gradient(param, step, i)
        kept = [None if p.grad is None else whole(p.grad).clone() for p in model.weights]
        optimizer.step()
        for param, before in zip(model.weights, kept, strict=True):
            assert before is None or torch.equal(whole(param.grad), before), "a step must not change gradients"
    return [whole(p) for p in model.weights]


def reference(shapes, skip=(), **settings):
    weights = [seeded(s, 0, i) for i, s in enumerate(shapes)]
    grads = [
        [None if t == 2 and i in skip else seeded(s, 1 + t, i) for i, s in enumerate(shapes)] for t in range(STEPS)
    ]
    return plain_muon(weights, grads, polar, **settings)


def split_groups(world_size, layout):
    """Fused QKV, a Conv1D-oriented matrix and an expert stack."""
    model, group = sharded(SPLIT, layout, world_size)
    w = model.weights
    groups = [
        {"params": [w[0]], "split": 3},
        {"params": [w[1]], "split": 3, "conv1d": True},
        {"params": [w[2]]},
    ]
    optimizer = Muon(groups, process_group=group)
    for step in range(STEPS):
        for i, param in enumerate(w):
            param.grad = gradient(param, step, i)
        optimizer.step()
    return [whole(p) for p in w]


LAYOUTS = [("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("fsdp", 4), ("hsdp", 4), ("ddp", 2), ("ddp", 3)]


def train_all(rank, world_size, layout):
    of = dict(layout=layout, world_size=world_size)
    awkward = dict(shapes=AWKWARD, bucket_bytes=5000, **of)
    return {
        "repeated": train(**awkward, skip=[3], weight_decay=0.1, share="never"),
        "shared": train(**awkward, skip=[3], weight_decay=0.1, share="always"),
        "sent as bfloat16": train(**awkward, comm_dtype=torch.bfloat16),
        "stacked": train(STACKED, **of, weight_decay=0.1, cautious=True),
        "few": train(FEW, **of),
        "split": split_groups(**of),
    }


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"{layout[0]}-{layout[1]}")
def job(request, tmp_path_factory):
    """``job("stacked")`` -> the whole weights of every rank: one launch for all tests of a layout."""
    layout, world_size = request.param
    ranks = run_workers(train_all, world_size, tmp_path_factory.mktemp("job"), layout=layout)
    return lambda name: [found[name] for found in ranks]


@pytest.mark.parametrize("share", ["repeated", "shared"])
def test_bitwise_on_awkward_shapes(job, share):
    """Float32, no two matrices stacked: one row, one column, rows < W, rows not divisible by W, tiny buckets."""
    expected = reference(AWKWARD, skip=[3], wd=0.1)
    for weights in job(share):
        for shape, a, b in zip(AWKWARD, weights, expected, strict=True):
            assert torch.equal(a, b), f"{shape} differs by {(a - b).abs().max()}"


def rounded(tensor):
    return tensor.bfloat16().float()


def test_bitwise_with_bfloat16_sent(job):
    """Both ways are rounded, wherever a matrix lives; the products between are those of float32."""
    weights = [seeded(s, 0, i) for i, s in enumerate(AWKWARD)]
    grads = [[seeded(s, 1 + t, i) for i, s in enumerate(AWKWARD)] for t in range(STEPS)]
    expected = plain_muon(weights, grads, lambda whole: rounded(polar(rounded(whole))))
    for got in job("sent as bfloat16"):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_stacks(job):
    """Equal shapes are stacked; rounding may differ, 1e-5 is the bound."""
    expected = reference(STACKED, wd=0.1, cautious=True)
    for weights in job("stacked"):
        for a, b in zip(weights, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_fewer_matrices_than_ranks(job):
    for weights in job("few"):
        assert torch.equal(weights[0], reference(FEW)[0])


def test_splits_conv1d_and_experts(job):
    pieces = {
        0: lambda x: list(x.split(4, 0)),
        1: lambda x: [c.T for c in x.split(4, 1)],
        2: lambda x: list(x.unbind(0)),
    }
    joins = {
        0: lambda p: torch.cat(p, 0),
        1: lambda p: torch.cat([c.T for c in p], 1),
        2: lambda p: torch.stack(p),
    }
    expected = []
    for i, shape in enumerate(SPLIT):
        grads = [pieces[i](seeded(shape, 1 + t, i)) for t in range(STEPS)]
        expected.append(joins[i](plain_muon(pieces[i](seeded(shape, 0, i)), grads, polar)))
    for weights in job("split"):
        for a, b in zip(weights, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def count(rank, world_size, shapes, layout, bucket_bytes):
    """Sent elements and collectives of one step, as seen at torch.distributed."""
    model, group = sharded(shapes, layout, world_size)
    optimizer = Muon(model.named_parameters(), process_group=group, bucket_bytes=bucket_bytes)
    for i, param in enumerate(model.weights):
        param.grad = gradient(param, 0, i)
    calls, original = [], dist.all_to_all_single

    def spy(output, input, output_splits, input_splits, **kwargs):
        assert output.numel() == sum(output_splits) and input.numel() == sum(input_splits)
        calls.append((sum(input_splits) - input_splits[rank]) * input.itemsize)
        return original(output, input, output_splits, input_splits, **kwargs)

    dist.all_to_all_single = spy
    others = {}
    for name in ("all_gather", "all_gather_into_tensor", "broadcast", "all_reduce", "reduce_scatter_tensor", "gather"):
        setattr(dist, name, counting(getattr(dist, name), name, others))
    optimizer.step()
    plan = optimizer._layouts[0].exchange.plan
    active = list(range(len(shapes)))
    return {
        "bytes": sum(calls),
        "calls": len(calls),
        "others": others,
        "formula": plan.elements_sent(rank, active) * 4,
        "buckets": len(plan.buckets(active)),
    }


def counting(function, name, counts):
    def wrapped(*args, **kwargs):
        counts[name] = counts.get(name, 0) + 1
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bytes_and_collectives(tmp_path, world_size):
    """Two all_to_all per bucket, one 16-byte agreement, nothing else; bytes by the formula of exchange.py."""
    shapes = [(48, 16), (16, 16), (64, 16), (16, 64)] * 6  # rows and matrices divide by 2 and 4
    results = run_workers(count, world_size, tmp_path, shapes=shapes, layout="fsdp", bucket_bytes=40_000)
    total = 4 * sum(m * n for m, n in shapes)
    for result in results:
        assert result["calls"] == 2 * result["buckets"] > 2
        assert result["others"] == {"all_reduce": 1}
        assert result["bytes"] == result["formula"]
    sent = sum(result["bytes"] for result in results)
    # Whatever the balance of owners, all ranks together send 2 b S (W-1)/W.
    slack = 0 if world_size != 3 else 0.02
    assert abs(sent - 2 * total * (world_size - 1) / world_size) <= slack * sent
    if world_size != 3:
        for result in results:
            assert result["bytes"] == pytest.approx(2 * total * (world_size - 1) / world_size**2, rel=0.25)


def missing_on_one(rank, world_size, layout):
    model, group = sharded([(6, 4), (4, 4)], layout, world_size)
    optimizer = Muon(model.named_parameters(), process_group=group)
    for i, param in enumerate(model.weights):
        param.grad = gradient(param, 0, i)
    if rank == 1:
        model.weights[0].grad = None
    before = [whole(p).clone() for p in model.weights]
    try:
        optimizer.step()
    except RuntimeError as error:
        assert all(torch.equal(whole(p), b) for p, b in zip(model.weights, before, strict=True))
        return str(error)
    return "no error"


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_gradient_missing_on_one_rank_is_an_error_everywhere(tmp_path, layout):
    for message in run_workers(missing_on_one, 3, tmp_path, layout=layout):
        assert "rank 1: weights.0" in message and "gradients" in message


def different_plans(rank, world_size):
    dist.init_process_group("gloo")
    weight = nn.Parameter(torch.zeros(4, 4 + rank))
    try:
        Muon([weight], process_group=dist.group.WORLD)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_different_plans_are_an_error(tmp_path):
    assert all("matrices" in m and "same parameters" in m for m in run_workers(different_plans, 2, tmp_path))


def nan_on_one(rank, world_size):
    model, _ = sharded([(8, 4), (8, 4), (6, 6)], "fsdp", world_size)
    optimizer = Muon(model.named_parameters())
    for _ in range(2):
        for i, param in enumerate(model.weights):
            param.grad = gradient(param, 0, i)
        if rank == 0:
            model.weights[0].grad.to_local().fill_(float("nan"))
        optimizer.step()
    return [whole(p) for p in model.weights]


def test_nan_does_not_desynchronise(tmp_path):
    first, *others = run_workers(nan_on_one, 3, tmp_path)
    for weights in others:
        assert all(torch.equal(a, b) or (a.isnan() == b.isnan()).all() for a, b in zip(first, weights, strict=True))
    assert first[0].isnan().any() and first[2].isfinite().all()


EVEN = [(8, 4), (4, 8), (16, 12), (4, 6, 4)]  # FSDP2 over tensor parallelism takes shards that divide


def tensor_parallel(rank, world_size, fsdp):
    """Weights that tensor parallelism has cut by rows and by columns, under FSDP2 or alone."""
    dist.init_process_group("gloo")
    mesh, model = mesh_of("fsdp x tp", world_size), Matrices(EVEN)
    cut(model, mesh["tp"], {i: i % 2 for i in range(len(EVEN))})
    if fsdp:
        fully_shard(model, mesh=mesh["fsdp"])
    optimizer = Muon(model.named_parameters(), bucket_bytes=5000)
    for step in range(STEPS):
        for i, param in enumerate(model.weights):
            param.grad = gradient(param, step, i)
        optimizer.step()
    return [whole(p) for p in model.weights]


@pytest.mark.parametrize(("world_size", "fsdp"), [(2, False), (4, True)])
def test_tensor_parallelism_changes_nothing(tmp_path, world_size, fsdp):
    expected = reference(EVEN[:3])
    for weights in run_workers(tensor_parallel, world_size, tmp_path, fsdp=fsdp):
        assert all(torch.equal(a, b) for a, b in zip(weights[:3], expected, strict=True))
        experts = [seeded(EVEN[3], 1 + t, 3) for t in range(STEPS)]
        for j, got in enumerate(weights[3]):
            (want,) = plain_muon([seeded(EVEN[3], 0, 3)[j]], [[grad[j]] for grad in experts], polar)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
