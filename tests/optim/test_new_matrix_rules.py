"""AdaMuon, NorMuon's variant, Dion2, NorDion2, KL-SOAP, PSGD-Kron and AdamH against their formulas, in float64."""

import math

import pytest
import torch
from torch import nn

from optim import KLSOAP, AdamH, AdaMuon, Dion2, NorDion2, NorMuon, PSGDKron, SOAPMuon
from optim.kron import factors_due
from tests.errors import raises_naming
from tests.optim.reference import SCALES, relative, seeded, svd_polar
from tests.optim.test_rules import SHAPES, STEPS, check, gradient, take_steps, train, weights

DECAY = 1 - 0.1 * 0.3
COMMON = dict(lr=0.1, weight_decay=0.3)


def sign_polar(x):
    """Of a matrix of signs, which is often singular: its null space stays."""
    u, values, vh = torch.linalg.svd(torch.sign(x), full_matrices=False)
    return u @ torch.diag((values > 1e-9).to(x.dtype)) @ vh


@pytest.mark.parametrize("nesterov", [True, False])
def test_adamuon(nesterov):
    def formula(w, g, s):
        s["m"] = 0.8 * s["m"] + 0.2 * g
        o = sign_polar(0.8 * s["m"] + 0.2 * g if nesterov else s["m"])
        s["v"] = 0.7 * s.get("v", 0) + 0.3 * o**2
        step = o / (s["v"].sqrt() + 0.1)
        return DECAY * w - 0.1 * 0.2 * math.sqrt(w.numel()) * step / step.norm()

    check(train(AdaMuon, momentum=0.8, beta2=0.7, eps=0.1, nesterov=nesterov, polar="svd", **COMMON), formula)


def test_normuon_of_the_longer_side_with_a_floor():
    def formula(w, g, s):
        o = SCALES["keller"](*w.shape) * svd_polar(g)
        s["v"] = 0.7 * s.get("v", 0) + 0.3 * (o**2).mean(1 if w.shape[0] >= w.shape[1] else 0, keepdim=True)
        step = o / s["v"].clamp_min(0.15).sqrt()
        return DECAY * w - 0.1 * step * o.norm() / step.norm()

    settings = dict(momentum=0.0, beta2=0.7, eps=0.0, nesterov=False, polar="svd", scale="keller")
    check(train(NorMuon, statistics="longer", floor=0.15, **settings, **COMMON), formula)


def chosen(m):
    """The half of M's rows with the largest l1 norms, in order."""
    sums = m.abs().sum(1).tolist()
    return sorted(sorted(range(len(sums)), key=sums.__getitem__)[-math.ceil(len(sums) / 2) :])


def test_dion2():
    def formula(w, g, s):
        s["m"], step = s["m"] + g, torch.zeros_like(w)
        index = chosen(s["m"])
        step[index] = svd_polar(s["m"][index])
        s["m"][index] *= 0.8
        return DECAY * w - 0.1 * math.sqrt(w.shape[0] / w.shape[1]) * step

    check(train(Dion2, momentum=0.8, fraction=0.5, polar="svd", **COMMON), formula)


def test_nordion2():
    def formula(w, g, s):
        s["m"], v = s["m"] + g, s.setdefault("v", torch.zeros(len(w), 1, dtype=w.dtype))
        index = chosen(s["m"])
        o = svd_polar(s["m"][index])
        s["m"][index] *= 0.8
        v[index] = 0.7 * v[index] + 0.3 * (o**2).mean(1, keepdim=True)
        normalised = o / (v[index].sqrt() + 1e-3)
        step = torch.zeros_like(w)
        step[index] = normalised * o.norm() / normalised.norm()
        return DECAY * w - 0.1 * math.sqrt(w.shape[0] / w.shape[1]) * step

    check(train(NorDion2, momentum=0.8, fraction=0.5, beta2=0.7, eps=1e-3, polar="svd", **COMMON), formula)


def test_dion2_with_all_rows_forgets_nothing():
    """fraction 1 is M <- mu M + G and its polar factor."""

    def formula(w, g, s):
        s["m"] = 0.8 * s["m"] + g
        return DECAY * w - 0.1 * math.sqrt(w.shape[0] / w.shape[1]) * svd_polar(s["m"])

    check(train(Dion2, momentum=0.8, fraction=1.0, polar="svd", **COMMON), formula)


@pytest.mark.parametrize("max_dim", [10, 4])
def test_kl_soap(max_dim):
    """With explicit inverses; a side longer than max_dim stands as it is."""

    def inverse(s, side):
        return s[f"q{side}"] @ torch.diag(1 / s[f"e{side}"]) @ s[f"q{side}"].T

    def formula(w, g, s):
        (m, n), t = g.shape, s.setdefault("t", 0)
        sides = [side for side, size in ((0, m), (1, n)) if size <= max_dim]
        if t == 0:
            for side, size in ((0, m), (1, n)):
                s |= {f"q{side}": torch.eye(size, dtype=g.dtype), f"e{side}": torch.ones(size, dtype=g.dtype)}
            for side in sides:
                x = g if side == 0 else g.T
                s[f"f{side}"], s[f"e{side}"] = 0.3 * x @ x.T / x.shape[1], s[f"e{side}"] * 0.1
                s[f"q{side}"] = torch.linalg.eigh(s[f"f{side}"])[1].flip(1)
            s |= {"t": 1, "v": torch.zeros_like(g)}
            return DECAY * w
        s["m"] = 0.8 * s["m"] + 0.2 * g  # in the plain space
        turned = s["q0"].T @ g @ s["q1"]
        s["v"] = 0.7 * s["v"] + 0.3 * turned**2
        step = s["q0"].T @ s["m"] @ s["q1"] / (1 - 0.8**t) / ((s["v"] / (1 - 0.7**t)).sqrt() + 1e-3)
        new = DECAY * w - 0.1 * s["q0"] @ step @ s["q1"].T
        fresh = (g @ inverse(s, 1) @ g.T / n, g.T @ inverse(s, 0) @ g / m)
        means = [(s[f"q{side}"].T @ fresh[side] @ s[f"q{side}"]).diagonal() for side in (0, 1)]
        for side in sides:
            s[f"f{side}"] = 0.7 * s[f"f{side}"] + 0.3 * fresh[side]
            s[f"e{side}"] = 0.7 * s[f"e{side}"] + 0.3 * means[side]
            if t % 2 == 0:
                power = s[f"f{side}"] @ s[f"q{side}"]
                order = (s[f"q{side}"] * power).sum(0).argsort(descending=True)
                s[f"q{side}"], s[f"e{side}"] = torch.linalg.qr(power[:, order])[0], s[f"e{side}"][order]
                s["v"] = s["v"][order] if side == 0 else s["v"][:, order]
        s["t"] = t + 1
        return new

    shapes, settings = [(5, 5), (4, 4)], dict(betas=(0.8, 0.7), eps=1e-3, update_freq=2, max_dim=max_dim, **COMMON)
    params = weights(shapes=shapes)
    take_steps(KLSOAP(params, **settings), params, range(7))
    for i, (shape, weight) in enumerate(zip(shapes, params, strict=True)):
        want, state = seeded(shape, 0, i, dtype=torch.float64), {"m": torch.zeros(shape, dtype=torch.float64)}
        for t in range(7):
            want = formula(want, gradient(shape, t, i), state)
        assert relative(weight.detach(), want) < 1e-10, shape


def noise(shape, step):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


@pytest.mark.parametrize("max_dim", [10, 4])
def test_kron(max_dim):
    def descend(q, a, b):
        one, two = a @ a.T, b @ b.T
        if q.shape[0] > max_dim:
            change = torch.diag((one - two).diagonal()) / (one + two).diagonal().max()
        else:
            longest = max(one + two, key=torch.norm)
            x = (one + two) @ longest
            change = torch.triu(one - two) / ((one + two) @ (x / x.norm())).norm()
        return q - 0.1 * change @ q

    def formula(w, g, s):
        s["m"], t = 0.8 * s["m"] + 0.2 * g, s.get("t", 0) + 1
        left, right = s.get("q", [torch.eye(size, dtype=w.dtype) for size in w.shape])
        momentum = s["m"] / (1 - 0.8**t)
        a, b = left @ momentum @ right.T, torch.inverse(left).T @ noise(w.shape, t) @ torch.inverse(right)
        s["q"], s["t"] = [descend(left, a, b), descend(right, a.T, b.T)], t
        left, right = s["q"]
        step = left.T @ left @ momentum @ right.T @ right
        return DECAY * w - 0.1 * step * min(1, 1.1 / ((step**2).mean().sqrt().item() + 1e-6))

    check(train(PSGDKron, momentum=0.8, max_dim=max_dim, **COMMON), formula)


def test_kron_is_the_package(monkeypatch):
    """pytorch_optimizer's, with the same noise, no balancing, and its solves in float32."""
    package = pytest.importorskip("pytorch_optimizer")
    steps = iter(range(1, 100))
    monkeypatch.setattr(torch, "randn_like", lambda x, **_: noise(x.shape, next(steps)))
    ours, theirs = ([nn.Parameter(seeded((6, 4), 0, 0, dtype=torch.float64))] for _ in range(2))
    take_steps(PSGDKron(ours, momentum=0.8, **COMMON), ours, range(8))
    settings = dict(pre_conditioner_update_probability=1.0, precondition_dtype=torch.float64, balance_prob=0.0)
    take_steps(package.Kron(theirs, momentum=0.8, **settings, **COMMON), theirs, range(8))
    assert relative(ours[0].detach(), theirs[0].detach()) < 1e-6


def test_kron_updates_its_factors_less_and_less():
    due = [step for step in range(1, 12_001) if factors_due(step)]
    assert due[:500] == list(range(1, 501)) and [factors_due(step) for step in due] == list(range(1, len(due) + 1))
    rates = [sum(first < step <= first + 500 for step in due) / 500 for first in (500, 1500, 2500, 8000)]
    expected = [2 * (math.exp(-t) - math.exp(-t - 0.5)) for t in (0, 1, 2)] + [0.03]
    assert rates == pytest.approx(expected, abs=0.003)


def test_adamh():
    def formula(w, g, s):
        s["t"] = s.get("t", 0) + 1
        s["m"] = 0.8 * s["m"] + 0.2 * g
        s["v"] = 0.7 * s.get("v", 0) + 0.3 * g**2
        u = s["m"] / (1 - 0.8 ** s["t"]) / ((s["v"] / (1 - 0.7 ** s["t"])).sqrt() + 1e-3)
        n = w - 0.1 * w.norm() * u / u.norm()
        return n * w.norm() / n.norm()

    got = train(AdamH, lr=0.1, betas=(0.8, 0.7), eps=1e-3)
    check(got, formula)
    for i, (shape, weight) in enumerate(zip(SHAPES, got, strict=True)):
        assert weight.norm().item() == pytest.approx(seeded(shape, 0, i, dtype=torch.float64).norm().item(), rel=1e-12)
    assert STEPS > 2


def test_wrong_settings_are_named():
    weight = [nn.Parameter(torch.zeros(4, 4))]
    for cls, settings, words in [
        (AdaMuon, dict(beta2=1.0), ("beta2=1.0", "[0, 1)")),
        (Dion2, dict(fraction=0.0), ("fraction=0.0", "above 0")),
        (Dion2, dict(constraint="hyperball"), ("constraint=hyperball", "Dion2")),
        (NorDion2, dict(beta2=-0.1), ("beta2=-0.1", "[0, 1)")),
        (PSGDKron, dict(precondition_lr=2.0), ("precondition_lr=2.0", "between 0 and 1")),
        (AdamH, dict(betas=(0.9, 1.0)), ("betas=(0.9, 1.0)", "[0, 1)")),
        (SOAPMuon, dict(brake=-1.0), ("brake=-1.0", "brake >= 0")),
        (SOAPMuon, dict(cautious_decay=float("nan")), ("cautious_decay=nan", ">= 0")),
        (SOAPMuon, dict(gate_floor=0.9), ("gate_floor=0.9", "gate_cap=0.85")),
    ]:
        with raises_naming(ValueError, *words):
            cls(weight, **settings)
        with raises_naming(ValueError, *words):
            cls([{"params": weight, **settings}])
