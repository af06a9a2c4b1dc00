"""Muon against an independent float64 SVD, its settings, and the container of roles."""

import copy

import pytest
import torch
from torch import nn

from optim import Muon
from optim.muon import SCALES
from optim.routing import assign_roles, build_from_config, resolve_target
from tests.errors import raises_naming
from tests.optim.reference import plain_muon, relative, seeded, svd_polar

SHAPES = [(6, 4), (4, 6), (5, 5), (1, 3), (3, 1), (6, 4)]


def train(optimizer_settings, steps=3, dtype=torch.float64):
    weights = [nn.Parameter(seeded(s, 0, i, dtype=dtype)) for i, s in enumerate(SHAPES)]
    optimizer = Muon(weights, **optimizer_settings)
    for t in range(steps):
        for i, w in enumerate(weights):
            w.grad = seeded(w.shape, 1 + t, i, dtype=dtype)
        optimizer.step()
    return [w.detach() for w in weights]


def plain(steps=3, **settings):
    weights = [seeded(s, 0, i, dtype=torch.float64) for i, s in enumerate(SHAPES)]
    grads = [[seeded(s, 1 + t, i, dtype=torch.float64) for i, s in enumerate(SHAPES)] for t in range(steps)]
    return plain_muon(weights, grads, svd_polar, **settings)


@pytest.mark.parametrize("scale", list(SCALES))
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("cautious", [True, False])
def test_exact_polar_is_the_formula(scale, nesterov, cautious):
    got = train(dict(polar="svd", scale=scale, nesterov=nesterov, cautious=cautious, weight_decay=0.3, momentum=0.8))
    want = plain(mu=0.8, nesterov=nesterov, wd=0.3, cautious=cautious, scale=scale)
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-12


def test_polar_express_is_near_the_formula():
    """Five steps of Polar Express (arXiv 2505.16932) leave a Gaussian 768 x 2304 matrix 9% from its polar factor in
    the Frobenius norm; these are small and a little worse conditioned."""
    got, want = train(dict(lr=1.0)), plain(lr=1.0)
    start = [seeded(s, 0, i, dtype=torch.float64) for i, s in enumerate(SHAPES)]
    for a, b, w in zip(got, want, start, strict=True):
        assert relative(a - w, b - w) < 0.25


def test_updates_scale_with_lr_and_zero_gradients_do_nothing():
    still = train(dict(lr=0.0, weight_decay=0.5))
    assert all(
        torch.equal(a, seeded(s, 0, i, dtype=torch.float64)) for i, (a, s) in enumerate(zip(still, SHAPES, strict=True))
    )
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = Muon([weight])
    weight.grad = torch.zeros(3, 2)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3, 2))


def test_state_dict_round_trip_continues_exactly():
    def steps(optimizer, weights, times):
        for t in times:
            for i, w in enumerate(weights):
                w.grad = seeded(w.shape, 1 + t, i)
            optimizer.step()

    weights = [nn.Parameter(seeded(s, 0, i)) for i, s in enumerate(SHAPES)]
    optimizer = Muon(weights, lr=0.1)
    steps(optimizer, weights, range(2))
    copies = [nn.Parameter(w.detach().clone()) for w in weights]
    resumed = Muon(copies, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, weights, range(2, 4))
    steps(resumed, copies, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))


def test_wrong_settings_are_named():
    weight = nn.Parameter(torch.zeros(4, 4))
    for settings, words in [
        (dict(scale="moonlight"), ("scale=moonlight", "keller, match_rms, rms_to_rms")),
        (dict(momentum=1.5), ("momentum=1.5", "[0, 1)")),
        (dict(polar="qr"), ("qr", "polar_express")),
        (dict(wire=torch.bfloat16), ("wire=torch.bfloat16", "comm_dtype")),
    ]:
        with raises_naming(ValueError, *words):
            Muon([weight], **settings)
    with raises_naming(ValueError, "norm.weight", "(4,)", "matrices"):
        Muon([("norm.weight", nn.Parameter(torch.zeros(4)))])
    with raises_naming(ValueError, "momentum=1.5", "[0, 1)"):
        Muon([{"params": [weight], "momentum": 1.5}])
    with raises_naming(ValueError, "split=0", "at least 1"):
        Muon([{"params": [weight], "split": 0}])
    with raises_naming(ValueError, "split=3", "4"):
        Muon([{"params": [weight], "split": 3}])
    with raises_naming(ValueError, "split=(2, 1, 2)", "adds up to 5", "4"):
        Muon([{"params": [weight], "split": [2, 1, 2]}])
    for split in ([4, 0], []):
        with raises_naming(ValueError, "split=0", "at least 1"):
            Muon([{"params": [weight], "split": split}])
    with raises_naming(ValueError, "head_dim=3", "4"):
        Muon([{"params": [weight], "head_dim": 3}])
    with raises_naming(ValueError, "head_dim=2", "split=2", "one of them"):
        Muon([{"params": [weight], "head_dim": 2, "split": 2}])
    with raises_naming(ValueError, "every=2", "update_freq"):
        Muon([{"params": [weight], "every": 2}])
    with raises_naming(TypeError, "Muon", "momentm"):
        Muon([weight], momentm=0.9)
    with raises_naming(RuntimeError, "at construction"):
        Muon([weight]).add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})


class Tiny(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.wte = nn.Embedding(10, 4)
        self.body = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 10, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.1, "betas": [0.8, 0.9]}
CONFIG = {"matrix": {"_target_": "optim.Muon", "lr": 0.02}, "embedding": ADAMW, "head": ADAMW, "scalar": ADAMW}


def test_every_parameter_has_one_role():
    assert assign_roles(Tiny(tied=False)) == {
        "wte.weight": "embedding",
        "body.weight": "matrix",
        "body.bias": "scalar",
        "norm.weight": "scalar",
        "norm.bias": "scalar",
        "lm_head.weight": "head",
    }
    assert assign_roles(Tiny(tied=True))["wte.weight"] == "embedding"
    assert "lm_head.weight" not in assign_roles(Tiny(tied=True))


def test_container_steps_all_roles_and_scales_their_lr():
    model = Tiny(tied=False)
    optimizers = build_from_config(model, CONFIG)
    assert [row["role"] for row in optimizers.table()] == ["matrix", "embedding", "head", "scalar"]
    assert sum(row["parameters"] for row in optimizers.table()) == sum(p.numel() for p in model.parameters())
    assert optimizers.set_lr(0.5) == {"matrix": 0.01, "embedding": 0.05, "head": 0.05, "scalar": 0.05}
    assert optimizers.set_lr(1.0)["matrix"] == 0.02
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.lm_head(model.norm(model.body(model.wte(torch.arange(10))))).square().sum().backward()
    optimizers.step()
    optimizers.zero_grad()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter.detach(), before[name]) and parameter.grad is None


def test_wrong_targets_are_named():
    for settings, words in [
        ({"lr": 1}, ("optim.matrix._target_=None", "torch.optim.AdamW")),
        ({"_target_": "torch.optim.AdamZ"}, ("optim.matrix._target_=torch.optim.AdamZ", "torch.optim.AdamW")),
        ({"_target_": "optim.lmo.lmo"}, ("optim.matrix._target_=optim.lmo.lmo", "torch.optim.AdamW")),
        ({"_target_": "optim.Muon", "momentm": 0.9}, ("optim.matrix.momentm=0.9", "optim.Muon", "momentum?")),
        ({"_target_": "torch.optim.AdamW", "learning": 1}, ("optim.matrix.learning=1", "lr, betas, eps")),
        ({"_target_": "optim.Shampoo", "every": 5}, ("optim.matrix.every=5", "update_freq")),
        ({"_target_": "optim.NorMuon", "wire": "bfloat16"}, ("optim.matrix.wire=bfloat16", "comm_dtype")),
    ]:
        with raises_naming(ValueError, *words):
            resolve_target(settings, "optim.matrix")
    assert resolve_target({"_target_": "optim.Muon", "bucket_bytes": 10}, "x")[1] == {"bucket_bytes": 10}
    for key in ("dtype", "comm_dtype"):
        assert resolve_target({"_target_": "optim.Muon", key: "bfloat16"}, "x")[1] == {key: torch.bfloat16}
    for wrong in ("bfloat", "int8", "nn"):
        with raises_naming(ValueError, f"optim.matrix.dtype={wrong}", "bfloat16"):
            resolve_target({"_target_": "optim.Muon", "dtype": wrong}, "optim.matrix")
    with raises_naming(ValueError, "optim.scalar"):
        build_from_config(Tiny(False), {k: v for k, v in CONFIG.items() if k != "scalar"})
    with raises_naming(ValueError, "optim.matrix", "scale=x", "keller"):
        build_from_config(Tiny(False), CONFIG | {"matrix": {"_target_": "optim.Muon", "scale": "x"}})


def test_it_is_copied_by_its_state_dict_only():
    model = nn.Linear(4, 3, bias=False)
    optimizer = Muon(model.parameters())
    with raises_naming(TypeError, "Muon", "process group", "state_dict()"):
        copy.deepcopy(optimizer)
    Muon(copy.deepcopy(model).parameters()).load_state_dict(copy.deepcopy(optimizer.state_dict()))
