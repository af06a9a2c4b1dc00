"""Sharded = whole for every rule: each layout and world size gives the bits of one process.

What one process computes is checked against the published formulas in tests/optim.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import optim
from optim.base import Optimizer
from optim.elementwise import Elementwise
from optim.guarded import step_unless
from tests.distributed.harness import run_workers
from tests.distributed.matrices import gradient, mesh_of, place, whole
from tests.optim.reference import AWKWARD, STACKED
from tests.optim.rules import with_all_rules

pytestmark = pytest.mark.slow
STEPS = 4
SKIPPED = 3  # this parameter has no gradient in step 2
RULES = {  # and every rule that is not here, at its defaults
    "normuon": (optim.NorMuon, dict(weight_decay=0.1)),
    "normuon_cautious": (optim.NorMuon, dict(weight_decay=0.1, cautious=True, scale="keller")),
    "scion": (optim.Scion, dict(lr=0.1)),
    "scion_rows": (optim.Scion, dict(lr=0.1, norm="rms_to_inf", constrained=False)),
    "scion_columns": (optim.Scion, dict(lr=0.1, norm="one_to_rms")),
    "steepest_spectral": (optim.Steepest, dict()),
    "steepest_spectral_regularised": (optim.Steepest, dict(form="regularised", polar="svd")),
    "steepest_nuclear": (optim.Steepest, dict(norm="nuclear", momentum=0.5)),
    "steepest_frobenius": (optim.Steepest, dict(norm="frobenius", momentum=0.5, weight_decay=0.1)),
    "steepest_max": (optim.Steepest, dict(norm="linf", form="regularised")),
    "shampoo": (optim.Shampoo, dict(update_freq=2, weight_decay=0.1)),
    "shampoo_newton": (optim.Shampoo, dict(update_freq=2, root="newton", eps=1e-4, statistics="sum", graft="sgd")),
    "shampoo_blocks": (optim.Shampoo, dict(update_freq=2, block=8, one_sided=True, graft="none", eps=1e-4)),
    "soap": (optim.SOAP, dict(update_freq=2, weight_decay=0.1)),
    "kl_soap": (optim.KLSOAP, dict(update_freq=2, max_dim=0)),
    "adamuon": (optim.AdaMuon, dict(eps=0.1)),
    "soap_one_side": (optim.SOAP, dict(update_freq=1, max_dim=10)),
}
RULES = with_all_rules(RULES)
RULES.pop("soapmuon")  # its sums over whole matrices are added in another order: tests/optim/test_soap_muon.py
ELEMENTWISE = {
    "lion": (optim.Lion, dict(weight_decay=0.1)),
    "signum": (optim.Signum, dict(weight_decay=0.1)),
    "adagrad_inside": (optim.AdagradInside, dict()),
    "rmsprop_inside": (optim.RMSpropInside, dict()),
    "sgd": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True, foreach=True)),
    "adagrad": (torch.optim.Adagrad, dict(lr=0.1, foreach=True)),
    "rmsprop": (torch.optim.RMSprop, dict(lr=0.1, foreach=True)),
    "adadelta": (torch.optim.Adadelta, dict(lr=1.0, foreach=True)),
    "adam": (torch.optim.Adam, dict(lr=0.1, amsgrad=True, fused=True)),
    "adamw": (torch.optim.AdamW, dict(lr=0.1, weight_decay=0.1, fused=True)),
}
ELEMENTWISE = with_all_rules(ELEMENTWISE, Elementwise)


def create(cls, model, group, settings):
    if issubclass(cls, optim.MatrixOptimizer):
        settings = dict(settings, process_group=group, bucket_bytes=10_000)
    return cls(model.named_parameters(), **settings)


def steps(model, optimizer, taken_back):
    for step in range(STEPS):
        for i, param in enumerate(model.weights):
            param.grad = None if step == 2 and i == SKIPPED else gradient(param, step, i)
        optimizer.step()
        if taken_back and isinstance(optimizer, Optimizer):  # a NaN, of which nothing may stay
            for param in model.weights:
                param.grad = torch.full_like(param, torch.nan)
            step_unless(torch.ones(()), optimizer)()


def train_one(cls, settings, shapes, mesh=None, group=None, taken_back=False):
    """The whole weights after STEPS steps, and per weight the elements of state that no DTensor holds."""
    model = place(shapes, mesh)
    optimizer = create(cls, model, group, settings)
    before = [set(optimizer.state.get(param, ())) for param in model.weights]
    steps(model, optimizer, taken_back)
    after = [set(optimizer.state[param]) for param in model.weights]
    assert cls.__module__.startswith("torch.") or before == after, f"{cls.__name__}: state appeared during training"
    held = [sum(v.numel() for v in optimizer.state[p].values() if not isinstance(v, DTensor)) for p in model.weights]
    return {"weights": [whole(p) for p in model.weights], "held": held}


def train_all(rank, world_size, layout):
    dist.init_process_group("gloo")
    mesh, group = mesh_of(layout, world_size), dist.group.WORLD if layout == "ddp" else None
    return {
        "awkward": {name: train_one(*rule, AWKWARD, mesh, group, True) for name, rule in (RULES | ELEMENTWISE).items()},
        "stacked": {name: train_one(*rule, STACKED, mesh, group) for name, rule in RULES.items()},
    }


@functools.cache
def alone(name, stacked=False):
    """On one process: the same for all layouts."""
    return train_one(*(RULES | ELEMENTWISE)[name], STACKED if stacked else AWKWARD)


LAYOUTS = [("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("fsdp", 4), ("hsdp", 4), ("ddp", 2), ("ddp", 3)]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"{layout[0]}-{layout[1]}")
def job(request, tmp_path_factory):
    """(layout, results by rank): one launch for all rules."""
    layout, world_size = request.param
    return layout, run_workers(train_all, world_size, tmp_path_factory.mktemp("job"), timeout=300, layout=layout)


def test_bitwise_on_awkward_shapes(job):
    """Float32, matrices of which no two are stacked: one row, one column, fewer rows than ranks, ragged shards."""
    for name, rule in (RULES | ELEMENTWISE).items():
        expected = alone(name)["weights"]
        for result in job[1]:
            for shape, got, want in zip(AWKWARD, result["awkward"][name]["weights"], expected, strict=True):
                if "fused" in rule[1]:  # torch's fused kernels round the ends of their vectors differently
                    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
                else:
                    assert torch.equal(got, want), f"{name} {shape} differs by {(got - want).abs().max()}"


def test_stacks_are_equal_to_rounding(job):
    """Equal shapes are stacked, differently in each layout."""
    for name in RULES:
        expected = alone(name, stacked=True)["weights"]
        for result in job[1]:
            for got, want in zip(result["stacked"][name]["weights"], expected, strict=True):
                torch.testing.assert_close(
                    got, want, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
                )


def test_every_matrix_has_its_state_at_one_owner(job):
    """In each shard group; sharded momentum is nobody's."""
    layout, results = job
    groups = [results[:2], results[2:]] if layout == "hsdp" else [results]
    momentum = {"normuon": True, "shampoo": False, "soap": False}
    for name, sharded in momentum.items() if layout != "ddp" else ():
        whole = alone(name, stacked=True)["held"]
        for group in groups:
            for i, (m, n) in enumerate(STACKED):
                held = sorted(result["stacked"][name]["held"][i] for result in group)
                assert held == [0] * (len(group) - 1) + [whole[i] - m * n * sharded]
