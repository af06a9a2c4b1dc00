"""Sums over whole blocks: fixed norms and row statistics are those of whole matrices, however these are cut."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import optim
from optim.matrix import MatrixOptimizer
from tests.errors import raises_naming
from tests.optim.reference import seeded, svd_polar
from tests.optim.threads import run_threads

# shape and settings of its group: no world size divides all of them, and blocks are cut where a rank ends
CASES = [
    ((5, 3), {}),
    ((1, 4), {}),
    ((7, 1), {}),
    ((12, 5), {"split": 3}),
    ((5, 6), {"split": 2, "conv1d": True}),
    ((5, 4, 3), {}),
    ((5, 3, 4), {"split": 2, "conv1d": True}),
    ((4, 2, 3, 2), {}),
    ((9, 4), {"split": (5, 2, 2)}),
    ((3, 7, 4), {"split": [3, 3, 1]}),
    ((4, 9), {"split": (5, 2, 2), "conv1d": True}),
    ((6, 4), {"head_dim": 2}),
]
STEPS, LR = 3, 0.1


class Floored(MatrixOptimizer):
    """Rows of the update are at least half as long as the weights', and a memory of them is kept on shards."""

    def __init__(self, params, lr=LR, **engine):
        super().__init__(params, dict(lr=lr), **engine)

    def shard_state(self, group, param):
        return {"last": torch.zeros_like(param)}

    def precondition(self, group, stack, state):
        return stack / stack.norm(dim=(-2, -1), keepdim=True)

    def measure(self, group, params, updates, states):
        pairs = zip(params, updates, strict=True)
        return [torch.stack([x.square().flatten(1).sum(1) for x in pair]) for pair in pairs]

    def apply(self, group, params, updates, scales, states, sums):
        for param, update, state, (square, update_square) in zip(params, updates, states, sums, strict=True):
            factor = (0.5 * (square / update_square).sqrt()).clamp_min(1)
            update = update * factor.view(-1, *[1] * (update.ndim - 1))
            param.sub_(update + state["last"], alpha=group["lr"])
            state["last"].copy_(update)

    def flops(self, group, shape, dtype):
        return float(shape[0] * shape[1])


def hyperball(w, u, memory):
    radius = w.norm()
    moved = w - LR * radius * u / u.norm().clamp_min(1e-10)
    return moved * radius / moved.norm().clamp_min(1e-10), memory


def muon(w, u, memory):
    return w - LR * (w.shape[0] / w.shape[1]) ** 0.5 * u, memory


def floored(w, u, memory):
    u = u / u.norm()
    u = u * (0.5 * w.norm(dim=1, keepdim=True) / u.norm(dim=1, keepdim=True)).clamp_min(1)
    return w - LR * (u + memory), u


RULES = {
    "hyperball": (optim.Muon, dict(lr=LR, momentum=0.0, polar="svd", constraint="hyperball"), svd_polar, hyperball),
    "muon": (optim.Muon, dict(lr=LR, momentum=0.0, polar="svd", scale="rms_to_rms"), svd_polar, muon),
    "steepest": (optim.Steepest, dict(lr=LR, norm="frobenius", constraint="hyperball"), lambda x: x, hyperball),
    "rows": (Floored, {}, lambda x: x, floored),
}


def blocks_of(x, settings):
    """[fan_out, fan_in] of every block, as views."""
    matrices = [x.flatten(1)] if x.ndim != 3 else list(x)
    matrices = [m.mT if settings.get("conv1d") else m for m in matrices]
    split = settings.get("split", len(matrices[0]) // settings["head_dim"] if "head_dim" in settings else 1)
    sizes = [len(matrices[0]) // split] * split if isinstance(split, int) else list(split)
    return [block for m in matrices for block in m.split(sizes)]


def expected(direction, step):
    weights = []
    for i, (shape, settings) in enumerate(CASES):
        weight = seeded(shape, 0, i, dtype=torch.float64)
        memory = torch.zeros_like(weight)
        for t in range(STEPS):
            grad = seeded(shape, 1 + t, i, dtype=torch.float64)
            for w, g, m in zip(*(blocks_of(x, settings) for x in (weight, grad, memory)), strict=True):
                new, kept = step(w.clone(), direction(g), m.clone())
                w.copy_(new), m.copy_(kept)
        weights.append(weight)
    return weights


def train(rule, place=lambda full: full, **engine):
    cls, settings, *_ = RULES[rule]
    weights = [nn.Parameter(place(seeded(shape, 0, i, dtype=torch.float64))) for i, (shape, _) in enumerate(CASES)]
    groups = [{"params": [w], **own} for w, (_, own) in zip(weights, CASES, strict=True)]
    optimizer = cls(groups, **settings, **engine, bucket_bytes=1500)
    for step in range(STEPS):
        for i, weight in enumerate(weights):
            weight.grad = place(seeded(weight.shape, 1 + step, i, dtype=torch.float64))
        optimizer.step()
    return [(w.full_tensor() if isinstance(w, DTensor) else w).detach() for w in weights]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", RULES)
def test_sums_are_those_of_whole_blocks(rule, world_size):
    def on_rank(rank):
        mesh = init_device_mesh("cpu", (world_size,))
        whole = train(rule, process_group=mesh.get_group())
        return whole, train(rule, lambda full: distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None))

    wanted = expected(*RULES[rule][2:])
    for results in run_threads(world_size, on_rank):
        for weights in results:
            for (shape, _), got, want in zip(CASES, weights, wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=f"{rule} {shape}")


@pytest.mark.parametrize(
    ("rule", "case", "summed"), [("plain", 0, False), ("hyperball", 0, True), ("rows", 0, False), ("rows", 4, True)]
)
def test_it_costs_an_all_reduce_only_where_something_is_cut(monkeypatch, rule, case, summed):
    """Rows are whole under Shard(0), except where they are stored as columns."""
    RULES_ = RULES | {"plain": (optim.Muon, {})}
    shape, own = CASES[case]
    calls = []

    def on_rank(rank):
        mesh = init_device_mesh("cpu", (2,))
        weight = nn.Parameter(distribute_tensor(seeded(shape, 0), mesh, [Shard(0)], src_data_rank=None))
        weight.grad = weight.detach().clone()
        cls, settings, *_ = RULES_[rule]
        optimizer = cls([{"params": [weight], **own}], **settings)
        monkeypatch.setattr(optimizer._layouts[0].exchange, "all_reduce", lambda sums: calls.append(sums.numel()))
        optimizer.step()

    run_threads(2, on_rank)
    assert len(calls) == 2 * summed


def test_norms_stay_through_many_float32_steps():
    weight = nn.Parameter(seeded((16, 8), 0))
    optimizer = optim.Muon([weight], lr=0.05, constraint="hyperball")
    before = weight.norm().item()
    for step in range(300):
        weight.grad = seeded((16, 8), 1 + step)
        optimizer.step()
    assert weight.norm().item() == pytest.approx(before, rel=1e-5)


def test_what_a_fixed_norm_leaves_without_effect_is_refused():
    with raises_naming(ValueError, "weight_decay=0.1", "hyperball", "weight_decay=0"):
        optim.Muon([nn.Parameter(torch.ones(2, 2))], weight_decay=0.1, constraint="hyperball")
    with raises_naming(ValueError, "constraint=ball", "hyperball"):
        optim.Muon([{"params": [nn.Parameter(torch.ones(2, 2))], "constraint": "ball"}])
