"""Sharded = whole for every rule: each layout and world size gives the bits of one process.

What one process computes is checked against the published formulas in tests/optim.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import optim
from tests.distributed.harness import run_workers
from tests.optim.reference import AWKWARD, STACKED, seeded

pytestmark = pytest.mark.slow
STEPS = 4
SKIPPED = 3  # this parameter has no gradient in step 2
RULES = {
    "normuon": ("NorMuon", dict(weight_decay=0.1)),
    "normuon_cautious": ("NorMuon", dict(weight_decay=0.1, cautious=True, scale="keller")),
    "scion": ("Scion", dict(lr=0.1)),
    "scion_rows": ("Scion", dict(lr=0.1, norm="rms_to_inf", constrained=False)),
    "scion_columns": ("Scion", dict(lr=0.1, norm="one_to_rms")),
    "steepest_spectral": ("Steepest", dict()),
    "steepest_spectral_regularised": ("Steepest", dict(step="regularised", polar="svd")),
    "steepest_nuclear": ("Steepest", dict(norm="nuclear", momentum=0.5)),
    "steepest_frobenius": ("Steepest", dict(norm="frobenius", momentum=0.5, weight_decay=0.1)),
    "steepest_max": ("Steepest", dict(norm="linf", step="regularised")),
    "shampoo": ("Shampoo", dict(every=2, weight_decay=0.1)),
    "shampoo_newton": ("Shampoo", dict(every=2, root="newton", eps=1e-4, statistics="sum", graft="sgd")),
    "shampoo_blocks": ("Shampoo", dict(every=2, block=8, one_sided=True, graft="none", eps=1e-4)),
    "soap": ("SOAP", dict(every=2, weight_decay=0.1)),
    "soap_one_side": ("SOAP", dict(every=1, max_dim=10)),
}
ELEMENTWISE = {
    "lion": ("Lion", dict(weight_decay=0.1)),
    "signum": ("Signum", dict(weight_decay=0.1)),
    "adagrad_inside": ("AdagradInside", dict()),
    "rmsprop_inside": ("RMSpropInside", dict()),
    "sgd": ("torch.SGD", dict(lr=0.1, momentum=0.9, nesterov=True, foreach=True)),
    "adagrad": ("torch.Adagrad", dict(lr=0.1, foreach=True)),
    "rmsprop": ("torch.RMSprop", dict(lr=0.1, foreach=True)),
    "adadelta": ("torch.Adadelta", dict(lr=1.0, foreach=True)),
    "adam": ("torch.Adam", dict(lr=0.1, amsgrad=True, fused=True)),
    "adamw": ("torch.AdamW", dict(lr=0.1, weight_decay=0.1, fused=True)),
}


class Matrices(nn.Module):
    def __init__(self, shapes):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(seeded(s, 0, i)) for i, s in enumerate(shapes)])


def place(shapes, layout, mesh):
    model = Matrices([tuple(shape) for shape in shapes])
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return model


def mesh_of(layout, world_size):
    if layout == "fsdp":
        return init_device_mesh("cpu", (world_size,))
    if layout == "hsdp":
        return init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    return None


def create(kind, model, group, settings):
    if kind.startswith("torch."):
        return getattr(torch.optim, kind.removeprefix("torch."))(model.parameters(), **settings)
    cls = getattr(optim, kind)
    if issubclass(cls, optim.MatrixOptimizer):
        settings = dict(settings, process_group=group, bucket_bytes=10_000)
    return cls(model.named_parameters(), **settings)


def gradient(param, step, index):
    full = seeded(param.shape, 1 + step, index)
    if isinstance(param, DTensor):
        return distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
    return full


def whole(param):
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach()


def steps(model, optimizer):
    for step in range(STEPS):
        for i, param in enumerate(model.weights):
            param.grad = None if step == 2 and i == SKIPPED else gradient(param, step, i)
        optimizer.step()


def train_all(rank, world_size, layout, rules, shapes):
    """rule -> whole weights after STEPS steps, and the owner state's elements per weight that this rank holds."""
    dist.init_process_group("gloo")
    mesh, group = mesh_of(layout, world_size), dist.group.WORLD if layout == "ddp" else None
    weights, owned = {}, {}
    for name, (kind, settings) in rules.items():
        model = place(shapes, layout, mesh)
        optimizer = create(kind, model, group, settings)
        before = {key: set(state) for key, state in optimizer.state_dict()["state"].items()}
        steps(model, optimizer)
        after = {key: set(state) for key, state in optimizer.state_dict()["state"].items()}
        assert kind.startswith("torch.") or before == after, f"{name}: state appeared during training"
        weights[name] = [whole(p) for p in model.weights]
        plain = [sum(v.numel() for v in optimizer.state[p].values() if not isinstance(v, DTensor)) for p in model.weights]
        owned[name] = plain if isinstance(optimizer, optim.MatrixOptimizer) else []
    return {"weights": weights, "owned": owned}


def alone(kind, settings, shapes):
    model = Matrices(shapes)
    optimizer = create(kind, model, None, settings)
    steps(model, optimizer)
    plain = [sum(v.numel() for v in optimizer.state[p].values()) for p in model.weights]
    return [p.detach() for p in model.weights], plain


LAYOUTS = [("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("fsdp", 4), ("hsdp", 4), ("ddp", 2), ("ddp", 3)]


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_bitwise_on_awkward_shapes(tmp_path, layout, world_size):
    """Float32, matrices of which no two are stacked: one row, one column, fewer rows than ranks, ragged shards."""
    results = run_workers(train_all, world_size, tmp_path, layout=layout, rules=RULES | ELEMENTWISE, shapes=AWKWARD)
    for name, (kind, settings) in (RULES | ELEMENTWISE).items():
        expected, _ = alone(kind, settings, AWKWARD)
        for result in results:
            for shape, got, want in zip(AWKWARD, result["weights"][name], expected, strict=True):
                assert torch.equal(got, want), f"{name} {shape} differs by {(got - want).abs().max()}"


@pytest.mark.parametrize(("layout", "world_size"), [("fsdp", 2), ("fsdp", 3), ("hsdp", 4), ("ddp", 2)])
def test_stacks(tmp_path, layout, world_size):
    """Equal shapes are stacked, differently in each layout: equal to rounding."""
    results = run_workers(train_all, world_size, tmp_path, layout=layout, rules=RULES, shapes=STACKED)
    for name, (kind, settings) in RULES.items():
        expected, _ = alone(kind, settings, STACKED)
        for result in results:
            for got, want in zip(result["weights"][name], expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("layout", "world_size"), [("fsdp", 3), ("hsdp", 4)])
def test_every_matrix_has_its_state_at_one_owner(tmp_path, layout, world_size):
    rules = {name: RULES[name] for name in ("normuon", "shampoo", "soap")}
    results = run_workers(train_all, world_size, tmp_path, layout=layout, rules=rules, shapes=STACKED)
    shard_groups = [results] if layout == "fsdp" else [results[:2], results[2:]]
    for name, (kind, settings) in rules.items():
        _, sizes = alone(kind, settings, STACKED)
        momentum = [m * n if name == "normuon" else 0 for m, n in STACKED]  # sharded, hence not with the owner
        for group in shard_groups:
            for i, size in enumerate(sizes):
                held = [result["owned"][name][i] for result in group]
                assert sorted(held) == [0] * (len(group) - 1) + [size - momentum[i]]
