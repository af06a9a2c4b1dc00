"""Shampoo against a plain float64 loop with scipy's matrix powers, and its identities."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from omegaconf import OmegaConf
from torch import nn

from optim import Shampoo
from tests.errors import raises_naming
from tests.optim.reference import relative, seeded, svd_polar

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(6, 4), (4, 6), (5, 5), (1, 3), (3, 1), (6, 4)]
STEPS = 5


def gradient(shape, t, i, dtype=torch.float64):
    return seeded(shape, 1 + t, i, dtype=dtype)


def train(shapes=SHAPES, steps=STEPS, dtype=torch.float64, **settings):
    weights = [nn.Parameter(seeded(s, 0, i, dtype=dtype)) for i, s in enumerate(shapes)]
    optimizer = Shampoo(weights, **settings)
    for t in range(steps):
        for i, w in enumerate(weights):
            w.grad = gradient(w.shape, t, i, dtype)
        optimizer.step()
    return [w.detach() for w in weights]


def power(a, exponent, eps):
    return np.real(scipy.linalg.fractional_matrix_power(a + eps * np.eye(len(a)), -exponent))


def plain_shampoo(w, grads, lr, betas, eps, statistics, exponent, update_freq, graft, wd, one_sided=False):
    """One matrix, one block.  ``one_sided`` preconditions the shorter side."""
    (beta1, beta2), (m, n) = betas, w.shape
    stats, roots = [np.zeros((m, m)), np.zeros((n, n))], [np.eye(m), np.eye(n)]
    momentum, second = np.zeros_like(w), np.zeros_like(w)
    used = [m <= n, m > n] if one_sided else [True, True]
    for t, g in enumerate(grads, start=1):
        for side, outer in enumerate((g @ g.T, g.T @ g)):
            if statistics == "ema":
                stats[side] = beta2 * stats[side] + (1 - beta2) * outer
                whole = stats[side] / (1 - beta2**t)
            else:
                stats[side] = whole = stats[side] + outer
            if used[side] and (t % update_freq == 0 or (t < update_freq and t in (1, 2, 4, 8))):
                roots[side] = power(whole, exponent, eps)
        momentum = beta1 * momentum + (1 - beta1) * g
        second = beta2 * second + (1 - beta2) * g**2
        mean = momentum / (1 - beta1**t)
        update = roots[0] @ mean @ roots[1]
        if graft == "adam":
            update *= np.linalg.norm(mean / (np.sqrt(second / (1 - beta2**t)) + 1e-8)) / np.linalg.norm(update)
        elif graft == "sgd":
            update *= np.linalg.norm(mean) / np.linalg.norm(update)
        w = (1 - lr * wd) * w - lr * update
    return w


SETTINGS = [
    dict(betas=(0.8, 0.9), statistics="ema", graft="adam", update_freq=1),
    dict(betas=(0.8, 0.9), statistics="ema", graft="sgd", update_freq=3),
    dict(betas=(0.8, 0.9), statistics="ema", graft="adam", update_freq=100),
    dict(betas=(0.0, 0.9), statistics="sum", graft="none", update_freq=2),
    dict(betas=(0.8, 0.9), statistics="sum", graft="adam", update_freq=2, exponent=0.5),
    dict(betas=(0.8, 0.9), statistics="ema", graft="none", update_freq=1, one_sided=True),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("root", ["eigh", "newton"])
def test_formula(settings, root):
    settings = dict(lr=0.1, eps=1e-3, weight_decay=0.3) | settings
    got = train(root=root, **settings)
    plain = settings | dict(wd=settings["weight_decay"])
    del plain["weight_decay"]
    plain["exponent"] = settings.get("exponent", 0.5 if settings.get("one_sided") else 0.25)
    for i, (shape, weight) in enumerate(zip(SHAPES, got, strict=True)):
        grads = [gradient(shape, t, i).numpy() for t in range(STEPS)]
        want = plain_shampoo(seeded(shape, 0, i, dtype=torch.float64).numpy(), grads, **plain)
        assert relative(weight, torch.from_numpy(want)) < 1e-8


class Record21:
    """Track 3's #21 in plain float64; changes the weight."""

    def __init__(self):
        self.m, self.v, self.grams, self.roots = 0.0, 0.0, [0.0, 0.0], []

    def __call__(self, w, g, t):
        n, c = t + 1, 1 - 0.95 ** (t + 1)
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.95 * self.v + 0.05 * g**2
        self.grams = [0.95 * gram + 0.05 * outer for gram, outer in zip(self.grams, (g @ g.mT, g.mT @ g), strict=True)]
        if n % 5 == 0:
            self.roots = [self.root(gram / c) for gram in self.grams]
        mean = self.m / (1 - 0.9**n)
        p = mean / ((self.v / c).sqrt() + 1e-10)
        if n >= 5:
            x = self.roots[0] @ mean @ self.roots[1]
            p = x * p.norm() / (x.norm() + 1e-16)
        w.sub_(0.0015 * (p + 0.2 * w))

    @staticmethod
    def root(gram):
        values, vectors = torch.linalg.eigh(gram)
        if values.min() < 1e-12:
            values = values - values.min() + 1e-12
        return vectors @ values.pow(-0.25).diag() @ vectors.mT


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_it_can_be_that_of_track_3(shape):
    """#21: Adam until the first roots, in step 5, when the factors have full rank, and lr, as every other setting."""
    preset = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/optim/track3/shampoo.yaml").optim.matrix)
    assert preset.pop("_target_") == "optim.Shampoo"
    weight = nn.Parameter(seeded(shape, 0, 0, dtype=torch.float64))
    optimizer, formula, want = Shampoo([weight], **preset), Record21(), weight.detach().clone()
    for t in range(24):
        weight.grad = gradient(shape, t, 0)
        optimizer.step()
        formula(want, weight.grad, t)
        assert relative(weight.detach(), want) < 1e-12, t


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 3), (3, 1)])
def test_without_memory_it_is_the_polar_factor(shape, one_sided):
    """beta = eps = 0, no grafting: L^-1/4 G R^-1/4 = (G Gt)^-1/2 G = U Vt, with pseudo-inverse roots."""
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = Shampoo([weight], lr=1.0, betas=(0.0, 0.0), eps=0.0, update_freq=1, graft="none", one_sided=one_sided)
    for t in range(3):
        before = weight.detach().clone()
        weight.grad = gradient(shape, t, 0)
        optimizer.step()
        assert relative(before - weight.detach(), svd_polar(weight.grad)) < 1e-12


def test_the_polar_factor_of_a_matrix_without_full_rank():
    thin = gradient((6, 2), 0, 0) @ gradient((2, 5), 1, 0)
    u, s, vh = torch.linalg.svd(thin)
    weight = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
    weight.grad = thin
    Shampoo([weight], lr=1.0, betas=(0.0, 0.0), eps=0.0, graft="none").step()
    assert relative(-weight.detach(), u[:, :2] @ vh[:2]) < 1e-6


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_blocks_are_matrices_of_their_own(shape):
    """block=5 cuts 8 into 2 x 4 and 12 into 3 x 4; every block is grafted alone."""
    settings = dict(lr=0.1, betas=(0.8, 0.9), eps=1e-3, update_freq=2)
    whole = nn.Parameter(seeded(shape, 0, 0, dtype=torch.float64))
    corners = list(itertools.product(range(0, shape[0], 4), range(0, shape[1], 4)))
    pieces = [nn.Parameter(whole.detach()[r : r + 4, c : c + 4].clone()) for r, c in corners]
    blocked, loose = Shampoo([whole], block=5, **settings), Shampoo(pieces, **settings)
    for t in range(STEPS):
        whole.grad = gradient(shape, t, 0)
        for piece, (r, c) in zip(pieces, corners, strict=True):
            piece.grad = whole.grad[r : r + 4, c : c + 4]
        blocked.step()
        loose.step()
    for piece, (r, c) in zip(pieces, corners, strict=True):
        assert relative(whole.detach()[r : r + 4, c : c + 4], piece.detach()) < 1e-12


@pytest.mark.parametrize("graft", ["adam", "sgd"])
def test_grafted_steps_have_the_grafted_length(graft):
    weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    weight.grad = gradient((6, 4), 0, 0)
    Shampoo([weight], lr=1.0, betas=(0.0, 0.0), graft=graft, eps=1e-6, graft_eps=0.0).step()
    want = math.sqrt(24) if graft == "adam" else weight.grad.norm().item()  # Adam's first step is a sign
    assert weight.detach().norm().item() == pytest.approx(want, rel=1e-12)


def test_float32_roots_follow_float64():
    """A wide spread of eigenvalues: every root stays finite, the step's direction near the exact one."""
    scale = torch.logspace(0, -3, 8, dtype=torch.float64)

    def update(dtype):
        weight = nn.Parameter(torch.zeros(8, 8, dtype=dtype))
        weight.grad = (gradient((8, 8), 0, 0) * scale).to(dtype)
        Shampoo([weight], lr=1.0, betas=(0.0, 0.0), eps=1e-12, graft="none").step()
        return weight.detach().double()

    assert relative(update(torch.float32), update(torch.float64)) < 0.05


@pytest.mark.parametrize(("log_condition", "least"), [(2, 0.999), (3, 0.98), (4, 0.9)])
def test_a_null_space_in_float32_does_not_drown_the_step(log_condition, least):
    """Statistics whose smallest eigenvalues are rounding; where these count as zero, the last cosine is 0.22."""
    out, along = (torch.linalg.qr(seeded((size, 48), 9, i, dtype=torch.float64)).Q for i, size in enumerate((48, 96)))
    grads = [(out * torch.logspace(0, -log_condition, 48) * seeded((48,), 1 + t, 0)) @ along.mT for t in range(12)]

    def update(dtype):
        weight = nn.Parameter(torch.zeros(48, 96, dtype=dtype))
        optimizer = Shampoo([weight], lr=1.0, graft="none", update_freq=12)
        for grad in grads:
            weight.detach().zero_()
            weight.grad = grad.to(dtype)
            optimizer.step()
        return weight.detach().double().flatten()

    assert torch.cosine_similarity(update(torch.float32), update(torch.float64), dim=0) > least


def test_nan_stays_in_its_matrix():
    weights = [nn.Parameter(seeded((4, 4), 0, i)) for i in range(3)]
    optimizer = Shampoo(weights, update_freq=1)
    for t in range(3):
        for i, w in enumerate(weights):
            w.grad = gradient((4, 4), t, i, torch.float32) * (float("nan") if (t, i) == (1, 1) else 1)
        optimizer.step()
    assert [bool(w.isfinite().all()) for w in weights] == [True, False, True]


def test_a_group_of_its_own_sides_has_their_exponent():
    weights = [torch.nn.Parameter(seeded((3, 5), 0, i, dtype=torch.float64)) for i in range(2)]
    settings = dict(lr=1.0, betas=(0.0, 0.0), eps=0.0, update_freq=1, graft="none")
    optimizer = Shampoo([{"params": weights[:1]}, {"params": weights[1:], "one_sided": True}], **settings)
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = seeded((3, 5), 1, dtype=torch.float64)
    optimizer.step()
    for weight, old in zip(weights, before, strict=True):
        assert relative(old - weight.detach(), svd_polar(weight.grad)) < 1e-12


def test_wrong_settings_are_named():
    for settings, words in [
        (dict(betas=(0.9, 1.0)), ("betas=(0.9, 1.0)", "[0, 1)")),
        (dict(update_freq=0), ("update_freq=0", "at least 1")),
        (dict(block=0), ("block=0", "at least 1")),
        (dict(graft="rmsprop"), ("graft=rmsprop", "none, adam, sgd")),
        (dict(statistics="mean"), ("statistics=mean", "ema, sum")),
        (dict(root="cholesky"), ("root=cholesky", "eigh, newton")),
        (dict(root="newton", exponent=0.3), ("root=newton", "1/p", "0.3", "root=eigh")),
        (dict(eps=-1.0), ("eps=-1.0", "eps >= 0")),
        (dict(exponent=0.0), ("exponent=0.0", "exponent > 0")),
        (dict(every=5), ("every=5", "update_freq")),
    ]:
        with raises_naming(ValueError, *words):
            Shampoo([{"params": [torch.nn.Parameter(torch.zeros(2, 2))], **settings}])
        with raises_naming(ValueError, *words):
            Shampoo([nn.Parameter(torch.zeros(2, 2))], **settings)
