"""AdEMAMix, ADOPT, MARS and schedule-free AdamW: their papers' formulas, their packages, and sharded = whole."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from optim import ADOPT, MARS, AdEMAMix, ScheduleFreeAdamW
from optim.elementwise import Elementwise
from tests.errors import raises_naming
from tests.optim.reference import relative, seeded
from tests.optim.rules import with_all_rules
from tests.optim.threads import run_threads

SHAPES = [(3, 4), (5,), (2, 3, 2), (1, 7)]
STEPS = 6
RULES = {
    "ademamix": (AdEMAMix, dict(lr=0.1, betas=(0.8, 0.7, 0.99), alpha=3.0, warmup=4, eps=0.01, weight_decay=0.3)),
    "ademamix_steady": (AdEMAMix, dict(lr=0.1, betas=(0.0, 0.7, 0.9), eps=0.01)),
    "adopt": (ADOPT, dict(lr=0.1, betas=(0.8, 0.7), eps=0.01, weight_decay=0.3)),
    "mars": (MARS, dict(lr=0.1, betas=(0.8, 0.7), gamma=0.3, eps=0.01, weight_decay=0.3)),
    "schedule_free": (ScheduleFreeAdamW, dict(lr=0.1, betas=(0.8, 0.7), eps=0.01, weight_decay=0.3)),
}


def weights(dtype=torch.float64, shapes=SHAPES):
    return [nn.Parameter(seeded(s, 0, i, dtype=dtype)) for i, s in enumerate(shapes)]


def gradient(shape, t, i, dtype=torch.float64):
    return seeded(shape, 1 + t, i, dtype=dtype) * (0.02 if i == 1 else 1)  # one whose norm MARS leaves


def take_steps(optimizer, params, steps=range(STEPS)):
    for t in steps:
        for i, p in enumerate(params):
            p.grad = gradient(p.shape, t, i, p.dtype)
        optimizer.step()


# Formulas on one tensor: (weight, gradient, state, step from 1) -> weight ------------------------------------------


def ademamix(w, g, s, t):
    grown = min(1, t / 4)
    half_life = (1 - grown) * math.log(0.5) / math.log(0.8) + grown * math.log(0.5) / math.log(0.99)
    slow = 0.5 ** (1 / half_life)
    s["m1"] = 0.8 * s.get("m1", 0) + 0.2 * g
    s["m2"] = slow * s.get("m2", 0) + (1 - slow) * g
    s["v"] = 0.7 * s.get("v", 0) + 0.3 * g**2
    root = torch.sqrt(s["v"] / (1 - 0.7**t)) + 0.01
    return w - 0.1 * ((s["m1"] / (1 - 0.8**t) + grown * 3 * s["m2"]) / root + 0.3 * w)


def ademamix_steady(w, g, s, t):
    s["m2"] = 0.9 * s.get("m2", 0) + 0.1 * g
    s["v"] = 0.7 * s.get("v", 0) + 0.3 * g**2
    return w - 0.1 * (g + 5 * s["m2"]) / (torch.sqrt(s["v"] / (1 - 0.7**t)) + 0.01)


def adopt(w, g, s, t):
    if t == 1:
        s["v"], s["m"] = g**2, torch.zeros_like(g)
        return w
    bound = (t - 1) ** 0.25
    s["m"] = 0.8 * s["m"] + 0.2 * torch.clamp(g / torch.sqrt(s["v"]).clamp(min=0.01), -bound, bound)
    s["v"] = 0.7 * s["v"] + 0.3 * g**2
    return w * (1 - 0.1 * 0.3) - 0.1 * s["m"]


def mars(w, g, s, t):
    c = g + 0.3 * 0.8 / 0.2 * (g - s.get("g", 0))
    c = c / max(1, c.norm())
    s["g"] = g
    s["m"] = 0.8 * s.get("m", 0) + 0.2 * c
    s["v"] = 0.7 * s.get("v", 0) + 0.3 * c**2
    update = s["m"] / (1 - 0.8**t) / (torch.sqrt(s["v"] / (1 - 0.7**t)) + 0.01)
    return w - 0.1 * (update + 0.3 * w)


def schedule_free(w, g, s, t):
    """The paper's X, Y and Z, with a constant lr, where c = 1 / t; the weights are Y."""
    x, z = s.get("x", w), s.get("z", w)
    s["v"] = 0.7 * s.get("v", 0) + 0.3 * g**2
    s["z"] = z - 0.1 * (g / (torch.sqrt(s["v"] / (1 - 0.7**t)) + 0.01) + 0.3 * w)
    s["x"] = (1 - 1 / t) * x + s["z"] / t
    return 0.2 * s["z"] + 0.8 * s["x"]


@pytest.mark.parametrize("name", list(RULES))
def test_formula(name):
    cls, settings = RULES[name]
    params = weights()
    optimizer = cls(params, **settings)
    take_steps(optimizer, params)
    states = []
    for i, (shape, got) in enumerate(zip(SHAPES, params, strict=True)):
        want, state = seeded(shape, 0, i, dtype=torch.float64), {}
        for t in range(STEPS):
            want = globals()[name](want, gradient(shape, t, i), state, t + 1)
        assert relative(got.detach(), want) < 1e-12
        states.append(state)
    if name == "schedule_free":
        optimizer.eval()
        for got, state in zip(params, states, strict=True):
            assert relative(got.detach(), state["x"]) < 1e-12


@pytest.mark.parametrize("name", list(RULES))
def test_package(name):
    """pytorch_optimizer's, whose ADOPT counts the first step in its bound, and whose MARS corrects eps for bias."""
    package = pytest.importorskip("pytorch_optimizer")
    cls, settings = RULES[name]
    decay = settings.get("weight_decay", 0.0) if name not in ("adopt", "mars") else 0.0  # it decays at other moments
    settings = settings | {"weight_decay": decay} | ({"eps": 0.0} if name == "mars" else {})
    extra = {
        "ademamix": dict(weight_decouple=True, t_alpha_beta3=4),
        "ademamix_steady": {},
        "adopt": dict(weight_decouple=True, clip_lambda=lambda step: (step - 1) ** 0.25),
        "mars": dict(optimize_1d=True),
        "schedule_free": {},
    }[name]
    theirs = {key: value for key, value in settings.items() if key != "warmup"} | extra
    ours, params = weights(), weights()
    other = getattr(package, cls.__name__)(params, **theirs)
    take_steps(cls(ours, **settings), ours)
    take_steps(other, params)
    for a, b in zip(ours, params, strict=True):
        assert relative(a.detach(), b.detach()) < 1e-12


# Sharded -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
def test_shards_are_parts_of_the_whole(layout, dtype):
    """The same bits over 1 to 4 ranks, with rows fewer than ranks; MARS' norm is that of the whole tensor."""
    cases = with_all_rules(RULES, Elementwise)

    def train(cls, settings, place=lambda full: full):
        params = [nn.Parameter(place(p.detach())) for p in weights(dtype)]
        optimizer = cls(params, **settings)
        for t in range(3):
            for i, p in enumerate(params):
                p.grad = place(gradient(p.shape, t, i, dtype))
            optimizer.step()
        if hasattr(optimizer, "eval"):
            optimizer.eval()
        return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in params]

    def on_rank(world_size):
        if layout == "fsdp":
            mesh, placements = init_device_mesh("cpu", (world_size,)), [Shard(0)]
        else:
            mesh, placements = init_device_mesh("cpu", (2, world_size // 2)), [Replicate(), Shard(0)]

        def place(full):
            return distribute_tensor(full, mesh, placements, src_data_rank=None)

        return {name: train(*case, place) for name, case in cases.items()}

    expected = {name: train(*case) for name, case in cases.items()}
    for world_size in (1, 2, 3, 4) if layout == "fsdp" else (4,):
        for got in run_threads(world_size, lambda rank, world_size=world_size: on_rank(world_size)):
            for name in cases:
                for a, b in zip(got[name], expected[name], strict=True):
                    tolerance = 1e-14 if dtype == torch.float64 and name in ("mars", "adamh") else 0.0
                    torch.testing.assert_close(a, b, rtol=tolerance, atol=0.0, msg=lambda text, n=name: f"{n}: {text}")


# Schedule-free -----------------------------------------------------------------------------------------------------


def test_warm_up_counts_less():
    """c_t = lr_max^2 over its sum, lr_max the largest so far: with lr 1, 2, 1 that is 1, 4/5, 4/9."""
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = ScheduleFreeAdamW([weight], betas=(0.5, 0.0), eps=0.0)
    x, z = 0.0, 0.0
    for lr, part in ((1.0, 1.0), (2.0, 4 / 5), (1.0, 4 / 9)):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.ones_like(weight)  # divided by its own size
        optimizer.step()
        z -= lr
        x = (1 - part) * x + part * z
        assert weight.item() == pytest.approx(0.5 * z + 0.5 * x, rel=1e-14)
    optimizer.eval()
    assert weight.item() == pytest.approx(x, rel=1e-14)


def test_evaluation_changes_no_bit_and_no_step_is_taken_in_it():
    params, undisturbed = weights(torch.float32), weights(torch.float32)
    optimizer, other = ScheduleFreeAdamW(params, lr=0.1), ScheduleFreeAdamW(undisturbed, lr=0.1)
    for t in range(3):
        take_steps(optimizer, params, [t])
        take_steps(other, undisturbed, [t])
        optimizer.eval()
        optimizer.eval()
        assert t == 0 or not torch.equal(params[0], undisturbed[0])
        with pytest.raises(RuntimeError, match=r"train\(\)"):
            optimizer.step()
        resumed = weights(torch.float32)  # from a state that was saved at the average
        successor = ScheduleFreeAdamW(resumed, lr=0.1)
        successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for a, b in zip(resumed, params, strict=True):
            a.data.copy_(b.data)
        params, optimizer = resumed, successor
        optimizer.train()
        assert all(torch.equal(a, b) for a, b in zip(params, undisturbed, strict=True))


def test_wrong_settings_are_named():
    for cls, settings, words in [
        (AdEMAMix, dict(betas=(0.9, 0.9, 1.0)), ("betas=(0.9, 0.9, 1.0)", "[0, 1)")),
        (AdEMAMix, dict(betas=(0.9, 0.9)), ("betas=(0.9, 0.9)", "3 numbers")),
        (AdEMAMix, dict(warmup=-1), ("warmup=-1", ">= 0")),
        (AdEMAMix, dict(alpha=float("nan")), ("alpha=nan", ">= 0")),
        (ADOPT, dict(betas=(0.9, 1.0)), ("betas=(0.9, 1.0)", "[0, 1)")),
        (MARS, dict(gamma=-0.1), ("gamma=-0.1", ">= 0")),
        (ScheduleFreeAdamW, dict(betas=(0.0, 0.9)), ("betas=(0.0, 0.9)", "above 0")),
    ]:
        with raises_naming(ValueError, *words):
            cls(weights(), **settings)
        with raises_naming(ValueError, *words):
            cls([{"params": weights(), **settings}])
