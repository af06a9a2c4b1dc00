"""A rule of one's own is one file: routing finds it, its state is saved by name, it works sharded, and tests see it."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import optim
from optim.elementwise import Elementwise
from optim.named_state import init_state, load_named, named_numbers, named_tensors
from optim.routing import build_from_config, resolve_target
from tests.errors import raises_naming
from tests.optim.reference import seeded
from tests.optim.rules import find_rules
from tests.optim.threads import run_threads

RULE = '''
"""W <- W - lr M / ||M||_F of the whole matrix, with a count of its steps at the owner."""

from .matrix import Group, MatrixOptimizer, ParamsT


class Counted(MatrixOptimizer):
    def __init__(self, params: ParamsT, lr: float = 0.1, power: float = 1.0, **engine):
        super().__init__(params, dict(lr=lr, power=power), **engine)

    def owner_state(self, group: Group, shape):
        return {"count": (shape[0],)}

    def precondition(self, group: Group, stack, state):
        state["count"].add_(1)
        return stack / stack.norm(dim=(-2, -1), keepdim=True) ** group["power"]

    def flops(self, group: Group, shape, dtype):
        return 3.0 * shape[0] * shape[1]
'''
ELEMENTWISE = '''
"""W <- W - lr sign(G), by its own file."""

import torch

from .elementwise import Elementwise


class SignOnly(Elementwise):
    def __init__(self, params, lr: float = 0.01):
        super().__init__(params, dict(lr=lr))

    def update(self, group, params, grads, *buffers):
        torch._foreach_add_(params, torch._foreach_sign(grads), alpha=-group["lr"])
'''
DOCUMENTED = (Path(__file__).resolve().parents[2] / "docs/optimizers.md").read_text()
CONFIG = {
    "matrix": {"_target_": "optim.counted.Counted", "lr": 0.2},
    "scalar": {"_target_": "optim.signonly.SignOnly"},
}


@pytest.fixture
def own_rules(tmp_path, monkeypatch):
    """Three files more in the package's folder."""
    files = {"counted": RULE, "signonly": ELEMENTWISE}
    (files["normalised"],) = re.findall(r"```python\n(.*?)```", DOCUMENTED, re.DOTALL)
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(optim, "__path__", [*optim.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield
    for name in files:
        sys.modules.pop(f"optim.{name}", None)
        vars(optim).pop(name, None)


def train(optimizers, model, steps):
    for step in steps:
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = seeded(parameter.shape, step, i)
        optimizers.step()


def test_routing_builds_names_and_saves_it(own_rules):
    model, copy = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizers = build_from_config(model, CONFIG)
    classes = {row["role"]: row["optimizer"] for row in optimizers.table()}
    assert classes == {"matrix": "optim.counted.Counted", "scalar": "optim.signonly.SignOnly"}
    train(optimizers, model, range(2))
    tensors, numbers = named_tensors(optimizers), named_numbers(optimizers)
    assert tensors["state.weight.count"].tolist() == [2.0] and numbers["matrix/0/step"] == 2
    copy.load_state_dict(model.state_dict())
    resumed = build_from_config(copy, CONFIG)
    init_state(resumed, tensors)
    load_named(resumed, tensors, numbers)
    train(optimizers, model, range(2, 4))
    train(resumed, copy, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    assert named_tensors(resumed)["state.weight.count"].tolist() == [4.0]


def test_a_wrong_setting_of_it_is_named(own_rules):
    with raises_naming(ValueError, "optim.matrix.powr=2", "power?"):
        resolve_target(CONFIG["matrix"] | {"powr": 2}, "optim.matrix")


def test_it_is_tested_without_being_listed(own_rules):
    assert {"Counted", "Normalised"} <= {cls.__name__ for cls in find_rules()}
    assert "SignOnly" in {cls.__name__ for cls in find_rules(Elementwise)}


@pytest.mark.parametrize("target", ["optim.counted.Counted", "optim.normalised.Normalised"])
def test_it_works_sharded(own_rules, target):
    shapes = [(5, 3), (5, 3), (2, 7)]

    def weights(place):
        cls, settings = resolve_target({"_target_": target, "lr": 0.1}, "optim.matrix")
        params = [nn.Parameter(place(seeded(s, 0, i))) for i, s in enumerate(shapes)]
        optimizer = cls(params, **settings)
        for i, param in enumerate(params):
            param.grad = place(seeded(shapes[i], 1, i))
        optimizer.step()
        return [param.detach() for param in params]

    def on_rank(rank):
        mesh = init_device_mesh("cpu", (3,))
        sharded = weights(lambda full: distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None))
        return [weight.full_tensor() for weight in sharded]

    weights_of_one = weights(lambda full: full)
    for got in run_threads(3, on_rank):
        for a, b in zip(got, weights_of_one, strict=True):
            torch.testing.assert_close(a, b)
