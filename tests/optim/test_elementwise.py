"""Every elementwise optimizer, ours and the library's, against its published formula in float64."""

import copy
import math

import pytest
import torch
from torch import nn

from optim import AdagradInside, Lion, RMSpropInside, Signum
from optim.elementwise import Elementwise
from tests.errors import raises_naming
from tests.optim.reference import relative, seeded
from tests.optim.rules import with_all_rules

SHAPES = [(3, 4), (5,), (2, 3, 2)]
STEPS = 5
OURS = {
    "lion": (Lion, dict(lr=0.01, betas=(0.8, 0.6), weight_decay=0.3)),
    "signum": (Signum, dict(lr=0.01, momentum=0.8, weight_decay=0.3)),
    "adagrad_inside": (AdagradInside, dict(lr=0.1, eps=0.01)),
    "rmsprop_inside": (RMSpropInside, dict(lr=0.1, gamma=0.7, eps=0.01)),
}
RULES = with_all_rules(OURS, Elementwise)


# Formulas on one tensor: (weight, gradient, state, step from 1) -> weight ------------------------------------------


def lion(w, g, s, t):
    m = s.get("m", 0)
    s["m"] = 0.6 * m + 0.4 * g
    return w * (1 - 0.01 * 0.3) - 0.01 * torch.sign(0.8 * m + 0.2 * g)


def signum(w, g, s, t):
    s["m"] = 0.8 * s.get("m", 0) + 0.2 * g
    return w * (1 - 0.01 * 0.3) - 0.01 * torch.sign(s["m"])


def adagrad_inside(w, g, s, t):
    s["v"] = s.get("v", 0) + g**2
    return w - 0.1 * g / torch.sqrt(s["v"] + 0.01)


def rmsprop_inside(w, g, s, t):
    s["v"] = 0.7 * s.get("v", 0) + 0.3 * g**2
    return w - 0.1 * g / torch.sqrt(s["v"] + 0.01)


def sgd(w, g, s, t):
    return w - 0.1 * g


def heavy_ball(w, g, s, t):
    s["v"] = 0.8 * s.get("v", 0) + g
    return w - 0.1 * s["v"]


def nesterov(w, g, s, t):
    s["v"] = 0.8 * s.get("v", 0) + g
    return w - 0.1 * (g + 0.8 * s["v"])


def adagrad(w, g, s, t):
    s["v"] = s.get("v", 0) + g**2
    return w - 0.1 * g / (torch.sqrt(s["v"]) + 0.01)


def rmsprop(w, g, s, t):
    s["v"] = 0.7 * s.get("v", 0) + 0.3 * g**2
    return w - 0.1 * g / (torch.sqrt(s["v"]) + 0.01)


def adadelta(w, g, s, t):
    s["v"] = 0.7 * s.get("v", torch.zeros_like(g)) + 0.3 * g**2
    d = torch.sqrt(s.get("d", torch.zeros_like(g)) + 0.01) / torch.sqrt(s["v"] + 0.01) * g
    s["d"] = 0.7 * s.get("d", torch.zeros_like(g)) + 0.3 * d**2
    return w - 0.5 * d


def adam(w, g, s, t, decay=0.0, maximum=False):
    s["m"] = 0.8 * s.get("m", 0) + 0.2 * g
    s["v"] = 0.7 * s.get("v", 0) + 0.3 * g**2
    s["top"] = torch.maximum(s.get("top", torch.zeros_like(g)), s["v"]) if maximum else s["v"]
    root = torch.sqrt(s["top"] / (1 - 0.7**t))
    return w * (1 - 0.1 * decay) - 0.1 * s["m"] / (1 - 0.8**t) / (root + 0.01)


LIBRARY = {
    "sgd": (torch.optim.SGD, dict(lr=0.1), sgd),
    "sgd_momentum": (torch.optim.SGD, dict(lr=0.1, momentum=0.8), heavy_ball),
    "nesterov": (torch.optim.SGD, dict(lr=0.1, momentum=0.8, nesterov=True), nesterov),
    "adagrad": (torch.optim.Adagrad, dict(lr=0.1, eps=0.01), adagrad),
    "rmsprop": (torch.optim.RMSprop, dict(lr=0.1, alpha=0.7, eps=0.01), rmsprop),
    "adadelta": (torch.optim.Adadelta, dict(lr=0.5, rho=0.7, eps=0.01), adadelta),
    "adam": (torch.optim.Adam, dict(lr=0.1, betas=(0.8, 0.7), eps=0.01), adam),
    "amsgrad": (
        torch.optim.Adam,
        dict(lr=0.1, betas=(0.8, 0.7), eps=0.01, amsgrad=True),
        lambda w, g, s, t: adam(w, g, s, t, maximum=True),
    ),
    "adamw": (
        torch.optim.AdamW,
        dict(lr=0.1, betas=(0.8, 0.7), eps=0.01, weight_decay=0.3),
        lambda w, g, s, t: adam(w, g, s, t, decay=0.3),
    ),
}
FORMULAS = {name: LIBRARY[name] for name in LIBRARY} | {name: (*OURS[name], globals()[name]) for name in OURS}


def gradient(shape, t, i, dtype=torch.float64):
    return seeded(shape, 1 + t, i, dtype=dtype)


def weights(dtype=torch.float64):
    return [nn.Parameter(seeded(s, 0, i, dtype=dtype)) for i, s in enumerate(SHAPES)]


def take_steps(optimizer, params, steps, skip=()):
    for t in steps:
        for i, p in enumerate(params):
            p.grad = None if (t, i) in skip else gradient(p.shape, t, i, p.dtype)
        optimizer.step()


@pytest.mark.parametrize("name", list(FORMULAS))
def test_formula(name):
    cls, settings, formula = FORMULAS[name]
    params = weights()
    take_steps(cls(params, **settings), params, range(STEPS))
    for i, (shape, got) in enumerate(zip(SHAPES, params, strict=True)):
        want, state = seeded(shape, 0, i, dtype=torch.float64), {}
        for t in range(STEPS):
            want = formula(want, gradient(shape, t, i), state, t + 1)
        assert relative(got.detach(), want) < 1e-12


@pytest.mark.parametrize("cls", [AdagradInside, RMSpropInside])
def test_without_eps_a_tiny_gradient_does_not_explode(cls):
    """Its square is 0 in float32."""
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.full((3,), 1e-25)
    cls([weight], lr=0.1, eps=0.0).step()
    assert weight.abs().max() < 1


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ((AdagradInside, dict(lr=0.1, eps=0.0)), (torch.optim.Adagrad, dict(lr=0.1, eps=0.0))),
        ((RMSpropInside, dict(lr=0.1, gamma=0.7, eps=0.0)), (torch.optim.RMSprop, dict(lr=0.1, alpha=0.7, eps=0.0))),
    ],
)
def test_inside_and_outside_agree_without_eps_only(inside, outside):
    def run(cls, settings):
        params = weights()
        take_steps(cls(params, **settings), params, range(STEPS))
        return torch.cat([p.detach().flatten() for p in params])

    assert relative(run(*inside), run(*outside)) < 1e-12
    with_eps = [(cls, settings | {"eps": 0.1}) for cls, settings in (inside, outside)]
    assert relative(run(*with_eps[0]), run(*with_eps[1])) > 1e-3


@pytest.mark.parametrize("name", list(RULES))
def test_state_is_complete_from_the_start_and_resumes_exactly(name):
    cls, settings = RULES[name]
    params = weights(torch.float32)
    optimizer = cls(params, **settings)
    keys = {i: set(s) for i, s in optimizer.state_dict()["state"].items()}
    take_steps(optimizer, params, range(2))
    assert keys == {i: set(s) for i, s in optimizer.state_dict()["state"].items()}
    assert len(keys) == (len(SHAPES) if cls.buffers else 0)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = cls(copies, **settings | {"lr": 9.0})
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(optimizer, params, range(2, 4))
    take_steps(resumed, copies, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


@pytest.mark.parametrize("name", list(RULES))
def test_missing_and_zero_gradients(name):
    cls, settings = RULES[name]
    params = weights()
    before = params[1].detach().clone()
    take_steps(cls(params, **settings), params, [0, 1], skip=[(0, 1), (1, 1)])
    assert torch.equal(params[1].detach(), before) and not torch.equal(
        params[0].detach(), seeded(SHAPES[0], 0, 0).double()
    )
    for eps in (settings.get("eps", 0.0), 0.0):
        weight = nn.Parameter(torch.ones(3))
        weight.grad = torch.zeros(3)
        cls(
            [weight],
            **{k: v for k, v in settings.items() if k not in ("weight_decay", "eps")},
            **({"eps": eps} if "eps" in settings else {}),
        ).step()
        assert torch.equal(weight.detach(), torch.ones(3))


def test_gradients_are_left_alone():
    for cls, settings in OURS.values():
        params = weights()
        optimizer = cls(params, **settings)
        take_steps(optimizer, params, [0])
        assert all(torch.equal(p.grad, gradient(p.shape, 0, i)) for i, p in enumerate(params))


def test_signum_is_constrained_scion_for_the_max_abs_ball():
    """lr = gamma rho, weight_decay = 1 / rho: the weights never leave the ball and come to fill it."""
    rho, gamma = 0.5, 0.1
    weight = nn.Parameter(seeded((4, 6), 0, dtype=torch.float64).clamp(-rho, rho))
    optimizer = Signum([weight], lr=gamma * rho, momentum=0.9, weight_decay=1 / rho)
    for _ in range(100):
        weight.grad = gradient(weight.shape, 0, 0)
        optimizer.step()
        assert weight.detach().abs().max() <= rho * (1 + 1e-12)
    assert math.isclose(weight.detach().abs().min(), rho, rel_tol=1e-4)


def test_wrong_settings_are_named():
    for cls, settings, words in [
        (Lion, dict(betas=(0.9, 1.0)), ("betas=(0.9, 1.0)", "[0, 1)")),
        (Signum, dict(momentum=1.5), ("momentum=1.5", "[0, 1)")),
        (RMSpropInside, dict(gamma=-0.1), ("gamma=-0.1", "[0, 1)")),
    ]:
        with raises_naming(ValueError, *words):
            cls([{"params": [nn.Parameter(torch.zeros(2))], **settings}])
        with raises_naming(ValueError, *words):
            cls(weights(), **settings)
