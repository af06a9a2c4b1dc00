"""NorMuon, Scion and Steepest against their formulas in float64, and what every whole-matrix rule owes."""

import copy
import math

import pytest
import torch
from torch import nn

from optim import SOAP, Dion2, Muon, NorMuon, Scion, Shampoo, Steepest, lmo
from optim.plan import Plan
from tests.errors import raises_naming
from tests.optim.reference import SCALES, relative, seeded, svd_polar
from tests.optim.rules import with_all_rules

SHAPES = [(6, 4), (4, 6), (5, 5), (1, 3), (3, 1), (6, 4)]
STEPS = 4
RULES = {
    "muon": (Muon, dict(weight_decay=0.1)),
    "normuon": (NorMuon, dict(weight_decay=0.1)),
    "scion": (Scion, dict(lr=0.1)),
    "steepest": (Steepest, dict()),
    "steepest_momentum": (Steepest, dict(norm="frobenius", form="regularised", momentum=0.5)),
    "shampoo": (Shampoo, dict(update_freq=2, weight_decay=0.1)),
    "shampoo_sum": (
        Shampoo,
        dict(update_freq=2, statistics="sum", root="newton", graft="sgd", one_sided=True, eps=1e-4),
    ),
    "soap": (SOAP, dict(update_freq=2, weight_decay=0.1)),
}
RULES = with_all_rules(RULES)


def weights(dtype=torch.float64, shapes=SHAPES):
    return [nn.Parameter(seeded(s, 0, i, dtype=dtype)) for i, s in enumerate(shapes)]


def gradient(shape, t, i, dtype=torch.float64):
    return seeded(shape, 1 + t, i, dtype=dtype)


def take_steps(optimizer, params, steps, skip=()):
    for t in steps:
        for i, p in enumerate(params):
            p.grad = None if (t, i) in skip else gradient(p.shape, t, i, p.dtype)
        optimizer.step()


def train(cls, **settings):
    params = weights()
    take_steps(cls(params, **settings), params, range(STEPS))
    return [p.detach() for p in params]


def check(got, formula, tolerance=1e-12):
    """``formula(w, g, state)`` -> new weight, on one matrix."""
    for i, (shape, weight) in enumerate(zip(SHAPES, got, strict=True)):
        want, state = seeded(shape, 0, i, dtype=torch.float64), {"m": torch.zeros(shape, dtype=torch.float64)}
        for t in range(STEPS):
            want = formula(want, gradient(shape, t, i), state)
        assert relative(weight, want) < tolerance, shape


# NorMuon ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["paper", "keller", "rms_to_rms"])
def test_normuon_is_the_paper(scale, nesterov):
    def formula(w, g, s):
        s["m"] = 0.8 * s["m"] + 0.2 * g
        o = svd_polar(0.8 * s["m"] + 0.2 * g if nesterov else s["m"])
        s["v"] = 0.7 * s.get("v", 0) + 0.3 * (o**2).mean(1, keepdim=True)
        normalised = o / (s["v"].sqrt() + 1e-3)
        if scale == "paper":
            step = 0.2 * math.sqrt(w.numel()) / normalised.norm()
        else:
            step = SCALES[scale](*w.shape) * o.norm() / normalised.norm()
        return w * (1 - 0.1 * 0.3) - 0.1 * step * normalised

    settings = dict(lr=0.1, momentum=0.8, beta2=0.7, eps=1e-3, weight_decay=0.3, nesterov=nesterov, polar="svd")
    check(train(NorMuon, scale="match_rms" if scale == "paper" else scale, **settings), formula)


@pytest.mark.parametrize("polar", ["polar_express", "newton_schulz5", "svd"])
def test_normuon_keeps_the_norm_of_muons_step(polar):
    for shape in SHAPES:
        steps = []
        for cls in (Muon, NorMuon):
            weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
            optimizer = cls([weight], lr=1.0, scale="keller", polar=polar)
            take_steps(optimizer, [weight], range(2))
            before = weight.detach().clone()
            take_steps(optimizer, [weight], [2])
            steps.append(weight.detach() - before)
        assert steps[0].norm().item() == pytest.approx(steps[1].norm().item(), rel=1e-12)


def test_normuon_evens_out_its_rows():
    """With statistics of the present step alone, all rows get equal norms."""
    weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    take_steps(NorMuon([weight], beta2=0.0, eps=0.0), [weight], [0])
    rows = weight.detach().norm(dim=1)
    assert torch.allclose(rows, rows.mean().expand(6), rtol=1e-12)


# Steepest and Scion ----------------------------------------------------------------------------------------------


def singular(x):
    return torch.linalg.svd(x, full_matrices=False)


def nuclear_step(x):
    u, _, vh = singular(x)
    return torch.outer(u[:, 0], vh[0])


def max_entry(x):
    return torch.where(x.abs() == x.abs().max(), x.sign(), 0.0)


# Direction -LMO(X), dual norm of X, norm of X: the tables of Bernstein and Newhouse (arXiv 2409.20325) and of Scion
# (arXiv 2502.07529), for X of d_out x d_in.
NORMS = {
    "l1": (max_entry, lambda x: x.abs().max(), lambda x: x.abs().sum()),
    "l2": (lambda x: x / x.norm(), lambda x: x.norm(), lambda x: x.norm()),
    "frobenius": (lambda x: x / x.norm(), lambda x: x.norm(), lambda x: x.norm()),
    "linf": (torch.sign, lambda x: x.abs().sum(), lambda x: x.abs().max()),
    "spectral": (svd_polar, lambda x: singular(x)[1].sum(), lambda x: singular(x)[1].max()),
    "nuclear": (nuclear_step, lambda x: singular(x)[1].max(), lambda x: singular(x)[1].sum()),
    "rms": (
        lambda x: math.sqrt(x.numel()) * x / x.norm(),
        lambda x: math.sqrt(x.numel()) * x.norm(),
        lambda x: x.norm() / math.sqrt(x.numel()),
    ),
    "rms_to_rms": (
        lambda x: math.sqrt(x.shape[0] / x.shape[1]) * svd_polar(x),
        lambda x: math.sqrt(x.shape[0] / x.shape[1]) * singular(x)[1].sum(),
        lambda x: math.sqrt(x.shape[1] / x.shape[0]) * singular(x)[1].max(),
    ),
    "one_to_rms": (
        lambda x: math.sqrt(x.shape[0]) * x / x.norm(dim=0, keepdim=True),
        lambda x: math.sqrt(x.shape[0]) * x.norm(dim=0).sum(),
        lambda x: x.norm(dim=0).max() / math.sqrt(x.shape[0]),
    ),
    "rms_to_inf": (
        lambda x: x / x.norm(dim=1, keepdim=True) / math.sqrt(x.shape[1]),
        lambda x: x.norm(dim=1).sum() / math.sqrt(x.shape[1]),
        lambda x: x.norm(dim=1).max() * math.sqrt(x.shape[1]),
    ),
}


def test_every_norm_is_tested():
    assert set(NORMS) == set(lmo.NORMS)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("form", ["normalised", "regularised"])
@pytest.mark.parametrize("norm", list(NORMS))
def test_steepest_is_the_lecture(norm, form, momentum):
    direction, dual, _ = NORMS[norm]

    def formula(w, g, s):
        s["m"] = momentum * s["m"] + (1 - momentum) * g
        return w * (1 - 0.01 * 0.3) - 0.01 * direction(s["m"]) * (dual(s["m"]) if form == "regularised" else 1)

    settings = dict(lr=0.01, momentum=momentum, weight_decay=0.3, polar="svd")
    check(train(Steepest, norm=norm, form=form, **settings), formula)


@pytest.mark.parametrize("polar", ["svd", "polar_express"])
def test_steepest_and_muon_meet(polar):
    """Muon without momentum is steepest descent under RMS -> RMS; the last slide is its spectral form."""
    muon = train(Muon, lr=0.1, momentum=0.0, nesterov=False, scale="rms_to_rms", polar=polar)
    steepest = train(Steepest, lr=0.1, norm="rms_to_rms", polar=polar)
    assert max(relative(a, b) for a, b in zip(muon, steepest, strict=True)) < 1e-12


@pytest.mark.parametrize("norm", ["spectral", "rms_to_rms", "frobenius", "one_to_rms", "nuclear"])
def test_regularised_step_decreases_a_smooth_function(norm):
    """f(W) = ||W - T||^2 / 2 in the norm's own smoothness constant: the descent lemma, here with a small step."""
    target, weight = gradient((5, 7), 0, 0), nn.Parameter(torch.zeros(5, 7, dtype=torch.float64))
    optimizer = Steepest([weight], lr=0.01, norm=norm, form="regularised", polar="svd")
    values = []
    for _ in range(50):
        weight.grad = weight.detach() - target
        values.append(weight.grad.square().sum().item())
        optimizer.step()
    assert all(b < a for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("norm", ["rms_to_rms", "spectral", "rms_to_inf", "linf"])
def test_scion_is_the_paper(norm, constrained):
    def formula(w, g, s):
        s["m"] = 0.8 * s["m"] + 0.2 * g
        return w * (1 - 0.1 if constrained else 1) - 0.1 * 5 * NORMS[norm][0](s["m"])

    settings = dict(lr=0.1, radius=5.0, momentum=0.8, constrained=constrained, polar="svd")
    check(train(Scion, norm=norm, **settings), formula)


@pytest.mark.parametrize(("polar", "slack"), [("svd", 1e-12), ("polar_express", 0.03)])
@pytest.mark.parametrize("norm", list(NORMS))
def test_scion_stays_in_its_ball(norm, polar, slack):
    size, params = NORMS[norm][2], [nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in SHAPES]
    optimizer = Scion(params, lr=0.3, norm=norm, radius=2.0, momentum=0.5, polar=polar)
    farthest = 0.0
    for t in range(30):
        take_steps(optimizer, params, [t % 3])
        farthest = max(farthest, *(size(p.detach()).item() for p in params))
    assert 1.0 < farthest <= 2.0 * (1 + slack)
    loose = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    optimizer = Scion([loose], lr=0.3, norm=norm, radius=2.0, momentum=0.5, polar=polar, constrained=False)
    for _ in range(30):
        take_steps(optimizer, [loose], [0])
    assert size(loose.detach()) > 4.0


# Every rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_is_complete_from_the_start_and_resumes_exactly(name, dtype):
    cls, settings = RULES[name]
    params = weights(dtype)
    optimizer = cls(params, **settings)

    def names():
        return {i: {k: v.shape for k, v in state.items()} for i, state in optimizer.state_dict()["state"].items()}

    before = names()
    take_steps(optimizer, params, range(3), skip=[(1, 2)])
    assert names() == before
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = cls(copies, **settings | {"lr": 0.5})
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(optimizer, params, range(3, 7))
    take_steps(resumed, copies, range(3, 7))
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


@pytest.mark.parametrize("name", list(RULES))
def test_zero_gradients_and_zero_lr_do_nothing(name):
    cls, settings = RULES[name]
    params = weights()
    take_steps(cls(params, **settings | {"lr": 0.0}), params, range(3))
    assert all(
        torch.equal(p.detach(), seeded(s, 0, i, dtype=torch.float64))
        for i, (p, s) in enumerate(zip(params, SHAPES, strict=True))
    )
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = cls(
        [weight],
        **{k: v for k, v in settings.items() if k != "weight_decay"},
        **({"constrained": False} if cls is Scion else {}),
    )
    for _ in range(3):
        weight.grad = torch.zeros(4, 3)
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(4, 3))


@pytest.mark.parametrize("name", list(RULES))
def test_late_and_missing_gradients(name):
    """A matrix without a gradient stays, and one whose first gradient comes late takes a step of ordinary size."""
    cls, settings = RULES[name]
    params, full = weights(), weights()
    late = [(t, 0) for t in range(4)]
    optimizer = cls(params, **settings)
    take_steps(optimizer, params, range(4), skip=late)
    assert torch.equal(params[0].detach(), seeded(SHAPES[0], 0, 0, dtype=torch.float64))
    take_steps(cls(full, **settings), full, range(4))
    assert all(torch.equal(a, b) for a, b in zip(params[1:5], full[1:5], strict=True)), "others must not notice"
    usual = max((a.detach() - b.detach()).norm() for a, b in zip(full, weights(), strict=True))
    take_steps(optimizer, params, [4])
    moved = (params[0].detach() - seeded(SHAPES[0], 0, 0, dtype=torch.float64)).norm()
    assert 0 < moved < usual


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(
    ("blocks", "sizes"), [({"split": 3}, [4] * 3), ({"split": [6, 3, 3]}, [6, 3, 3]), ({"head_dim": 2}, [2] * 6)]
)
def test_splits_are_matrices_of_their_own(name, blocks, sizes, conv1d):
    cls, settings = RULES[name]
    fused = nn.Parameter(seeded((4, 12) if conv1d else (12, 4), 0, dtype=torch.float64))
    parts = [nn.Parameter(x.clone()) for x in (fused.detach().T if conv1d else fused.detach()).split(sizes)]
    whole, loose = cls([{"params": [fused], "conv1d": conv1d, **blocks}], **settings), cls(parts, **settings)
    for t in range(STEPS):
        fused.grad = gradient(fused.shape, t, 0)
        for part, grad in zip(parts, (fused.grad.T if conv1d else fused.grad).split(sizes), strict=True):
            part.grad = grad.contiguous()
        whole.step()
        loose.step()
    joined = torch.cat([part.detach() for part in parts])
    assert relative(fused.detach().T if conv1d else fused.detach(), joined) < 1e-10


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_state_and_work_are_balanced(name, world_size):
    """GPT-2's 48 matrices: a rank's state within 10% of the mean, FLOPs of the slowest rank within 5% of ideal, or 6%
    where most of them are in few matrices."""
    cls, settings = RULES[name]
    width = 768
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * 12
    optimizer = cls([nn.Parameter(torch.empty(s, device="meta")) for s in shapes], **settings)
    specs = optimizer._layouts[0].exchange.plan.specs
    owners = Plan(specs, world_size, 10**7).owners
    sharded, owned, work = 0, [0] * world_size, [0.0] * world_size
    for spec, owner, param in zip(specs, owners, optimizer.param_groups[0]["params"], strict=True):
        for key, value in optimizer.state[param].items():
            if key in optimizer._shard_keys:
                sharded += value.numel()
            else:
                owned[owner] += value.numel()
        work[owner] += spec.flops
    held = [sharded / world_size + elements for elements in owned]
    assert max(work) <= (1.06 if issubclass(cls, Dion2) else 1.05) * sum(work) / world_size
    assert max(held) <= 1.10 * sum(held) / world_size


def test_wrong_settings_are_named():
    weight = [nn.Parameter(torch.zeros(4, 4))]
    for cls, settings, words in [
        (NorMuon, dict(beta2=1.0), ("beta2=1.0", "[0, 1)")),
        (NorMuon, dict(momentum=1.5), ("momentum=1.5", "[0, 1)")),
        (Steepest, dict(norm="manhattan"), ("norm=manhattan", "rms_to_rms")),
        (Steepest, dict(form="squared"), ("form=squared", "normalised, regularised")),
        (Steepest, dict(polar="qr"), ("qr", "svd")),
        (Scion, dict(lr=1.5), ("lr=1.5", "[0, 1]")),
        (Scion, dict(momentum=-0.1), ("momentum=-0.1", "[0, 1)")),
    ]:
        with raises_naming(ValueError, *words):
            cls(weight, **settings)
        with raises_naming(ValueError, *words):
            cls([{"params": weight, **settings}])
