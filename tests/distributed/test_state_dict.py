"""torch's own state tools, which know nothing of ours: what one layout has saved goes on in any other.

Every run is compared with one process that was not interrupted, in float64, to 1e-12.
"""

import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import optim
from tests.distributed.harness import run_workers
from tests.distributed.matrices import Matrices, cut, gradient, mesh_of, whole
from tests.errors import raises_naming

pytestmark = pytest.mark.slow
SHAPES = [(6, 4), (4, 6), (5, 5), (1, 7), (7, 2), (3, 4, 4), (6, 4)]
RULES = {
    "adamw": (torch.optim.AdamW, dict(lr=0.1, weight_decay=0.1)),
    "muon": (optim.Muon, dict(weight_decay=0.1)),
    "normuon": (optim.NorMuon, dict()),
    "shampoo": (optim.Shampoo, dict(update_freq=2, eps=1e-4)),
    "soap": (optim.SOAP, dict(update_freq=2, lr=0.01)),
}
SAVED, ALL = 3, 6  # updates
# Each once as the source and once as the target of the one before; from every one to every one in the long campaign.
ROUND = [("single", 1), ("fsdp", 2), ("ddp", 2), ("fsdp x tp", 4), ("fsdp", 3), ("hsdp", 4)]
SOAK = "NANOMUON_SOAK" in os.environ
if SOAK:
    ROUND.append(("fsdp", 4))
CUT_BY_TP = {0: 1, 1: 0, 6: 1}  # FSDP2 over tensor parallelism takes shards that divide; other weights are not cut


def build(name, layout="single", world_size=1):
    model = Matrices(SHAPES).double()
    mesh = mesh_of(layout, world_size)
    if layout == "fsdp x tp":
        cut(model, mesh["tp"], CUT_BY_TP)
        mesh = mesh["fsdp"]
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    cls, settings = RULES[name]
    if layout == "ddp" and issubclass(cls, optim.MatrixOptimizer):
        settings = settings | dict(process_group=dist.group.WORLD)
    return model, cls(model.named_parameters(), **settings)


def train(model, optimizer, steps):
    for step in steps:
        for i, param in enumerate(model.weights):
            param.grad = gradient(param, step, i).to(param.dtype)
        optimizer.step()
    return [whole(param) for param in model.weights]


@pytest.fixture(scope="module")
def uninterrupted():
    return {name: train(*build(name), range(ALL)) for name in RULES}


def assert_same(results, uninterrupted):
    for result in results:
        for name, weights in uninterrupted.items():
            for shape, got, want in zip(SHAPES, result[name], weights, strict=True):
                error = (got - want).abs().max() / want.abs().max()
                assert error <= 1e-12, f"{name} {shape} differs by {error}"


def states(model, optimizer):
    consolidate(optimizer)
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}


def consolidate(optimizer, to=None):
    if isinstance(optimizer, optim.MatrixOptimizer):
        optimizer.consolidate_state_dict(to=to)


def go_on(rank, world_size, layout, sources, target):
    """Every rule's weights at the end, from each of ``sources``; and a run from the beginning, saved to ``target``."""
    if layout != "single":
        dist.init_process_group("gloo")
    ends = []
    for source in sources:
        built = {name: build(name, layout, world_size) for name in RULES}
        loaded = {name: states(*pair) for name, pair in built.items()}
        dcp.load(loaded, checkpoint_id=source)
        for name, (model, optimizer) in built.items():
            set_model_state_dict(model, loaded[name]["model"])
            set_optimizer_state_dict(model, optimizer, loaded[name]["optim"])
        ends.append({name: train(*pair, range(SAVED, ALL)) for name, pair in built.items()})
    if target:
        built = {name: build(name, layout, world_size) for name in RULES}
        for pair in built.values():
            train(*pair, range(SAVED))
        dcp.save({name: states(*pair) for name, pair in built.items()}, checkpoint_id=target)
    return ends


def test_dcp_from_every_layout_to_another(tmp_path, uninterrupted):
    folders, again = [], ROUND if SOAK else ROUND[:1]
    for launch, (layout, ranks) in enumerate(ROUND + again):
        sources = folders if SOAK else folders[-1:]
        target = f"{tmp_path}/{launch}" if launch < len(ROUND) else ""
        for ends in run_workers(go_on, ranks, tmp_path, layout=layout, sources=sources, target=target):
            assert len(ends) == len(sources)
            assert_same(ends, uninterrupted)
        folders += [target] if target else []


def full(rank, world_size, layout):
    dist.init_process_group("gloo")
    weights, sharded = {}, StateDictOptions(full_state_dict=True, cpu_offload=True)
    from_rank0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for name in RULES:
        model, optimizer = build(name, layout, world_size)
        train(model, optimizer, range(SAVED))
        consolidate(optimizer)
        saved = (
            get_model_state_dict(model, options=sharded),
            get_optimizer_state_dict(model, optimizer, options=sharded),
        )
        if rank == 0:
            held = [value for state in saved[1]["state"].values() for value in state.values()]
            assert not any(isinstance(value, DTensor) for value in held), "a full state dict is of plain tensors"
        model, optimizer = build(name, layout, world_size)
        train(model, optimizer, [9])
        consolidate(optimizer)
        set_model_state_dict(model, saved[0] if rank == 0 else {}, options=from_rank0)
        set_optimizer_state_dict(model, optimizer, saved[1] if rank == 0 else {}, options=from_rank0)
        weights[name] = train(model, optimizer, range(SAVED, ALL))
    return weights


@pytest.mark.parametrize(("layout", "ranks"), [("fsdp", 2), ("hsdp", 4), ("ddp", 2)])
def test_full_state_dicts_broadcast_from_rank_0(tmp_path, uninterrupted, layout, ranks):
    assert_same(run_workers(full, ranks, tmp_path, layout=layout), uninterrupted)


def zero_style(rank, world_size, source, target):
    """As with ZeroRedundancyOptimizer: consolidate, save on rank 0, load everywhere."""
    dist.init_process_group("gloo")
    weights = {}
    for name in RULES:
        model, optimizer = build(name, "ddp", world_size)
        if source:
            model_state, state = torch.load(f"{source}/{name}.pt", weights_only=True)
            model.load_state_dict(model_state)
            optimizer.load_state_dict(state)
        weights[name] = train(model, optimizer, range(SAVED, ALL) if source else range(SAVED))
        if target:
            if name in ("normuon", "shampoo", "soap"):
                with raises_naming(RuntimeError, "rank", "consolidate_state_dict"):
                    optimizer.state_dict()
            consolidate(optimizer, to=0)
            if rank == 0:
                torch.save((model.state_dict(), optimizer.state_dict()), f"{target}/{name}.pt")
    dist.barrier()
    return weights


def test_ddp_consolidates_and_loads_on_any_number_of_ranks(tmp_path, uninterrupted):
    run_workers(zero_style, 2, tmp_path, source="", target=str(tmp_path))
    for ranks in (2, 3, 1):
        assert_same(run_workers(zero_style, ranks, tmp_path, source=str(tmp_path), target=""), uninterrupted)


def refused(rank, world_size):
    """A state that only one rank finds wrong is refused on all; nothing is loaded."""
    dist.init_process_group("gloo")
    model, optimizer = build("soap", "fsdp", world_size)
    train(model, optimizer, [0])
    before = optimizer.state_dict()
    saved = optimizer.state_dict()
    if rank == 1:
        del saved["state"][0]["left"]
    with raises_naming(ValueError, "weights.0" if rank == 1 else "another rank"):
        optimizer.load_state_dict(saved)
    for a, b in zip(before["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(whole(a[key]), whole(b[key])) for key in a)
    return True


def test_ranks_refuse_together(tmp_path):
    assert run_workers(refused, 2, tmp_path) == [True, True]
