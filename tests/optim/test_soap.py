"""SOAP against a plain float64 loop in numpy, and the laws that it owes to Adam."""

import numpy as np
import pytest
import torch
from torch import nn

from optim import SOAP
from tests.errors import raises_naming
from tests.optim.reference import relative, seeded

SHAPES = [(6, 4), (4, 6), (5, 5), (1, 3), (3, 1), (6, 4)]
STEPS = 7


def gradient(shape, t, i):
    return seeded(shape, 1 + t, i, dtype=torch.float64)


def train(shapes=SHAPES, steps=STEPS, prepare=lambda optimizer: None, **settings):
    weights = [nn.Parameter(seeded(s, 0, i, dtype=torch.float64)) for i, s in enumerate(shapes)]
    optimizer = SOAP(weights, **settings)
    prepare(optimizer)
    for t in range(steps):
        for i, w in enumerate(weights):
            w.grad = gradient(w.shape, t, i)
        optimizer.step()
    return [w.detach() for w in weights]


def plain_soap(w, grads, lr, beta1, beta2, eps, wd, update_freq, max_dim, bases=None):
    """The paper's algorithm 3 on one matrix: momentum in the original space, turned anew in every step.

    From ``bases`` (size -> basis) if given, else from those of the first gradient.
    """
    sides = [size <= max_dim for size in w.shape]
    stats = [np.zeros((size, size)) for size in w.shape]
    given = bases is not None
    bases = [bases[size].numpy() if given else np.eye(size) for size in w.shape]
    momentum, second = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads, start=1 if given else 0):
        w = w * (1 - lr * wd)
        if t > 0:
            momentum = beta1 * momentum + (1 - beta1) * g
            second = beta2 * second + (1 - beta2) * (bases[0].T @ g @ bases[1]) ** 2
            turned = bases[0].T @ momentum @ bases[1] / (1 - beta1**t)
            w = w - lr * bases[0] @ (turned / (np.sqrt(second / (1 - beta2**t)) + eps)) @ bases[1].T
        for side, outer in enumerate((g @ g.T, g.T @ g)):
            stats[side] = beta2 * stats[side] + (1 - beta2) * outer
            if not sides[side]:
                continue
            if t == 0:
                bases[side] = np.linalg.eigh(stats[side])[1]
            elif t % update_freq == 0:
                order = np.argsort(-np.diag(bases[side].T @ stats[side] @ bases[side]), kind="stable")
                second = second[order] if side == 0 else second[:, order]
                bases[side] = np.linalg.qr(stats[side] @ bases[side][:, order])[0]
    return w


def compare(got, shapes, **settings):
    for i, (shape, weight) in enumerate(zip(shapes, got, strict=True)):
        grads = [gradient(shape, t, i).numpy() for t in range(STEPS)]
        want = plain_soap(seeded(shape, 0, i, dtype=torch.float64).numpy(), grads, 0.1, 0.8, 0.9, 1e-3, 0.3, **settings)
        assert relative(weight, torch.from_numpy(want)) < 1e-9


@pytest.mark.parametrize(("update_freq", "max_dim"), [(1, 5), (3, 5), (2, 4), (1, 2)])
def test_is_the_paper(update_freq, max_dim):
    """Both sides have a basis where the first gradient determines it: in square matrices."""
    shapes = [(5, 5), (4, 6), (6, 4), (4, 4), (1, 6)]
    settings = dict(update_freq=update_freq, max_dim=max_dim)
    got = train(shapes, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3, **settings)
    compare(got, shapes, **settings)


def test_rectangles_from_given_bases():
    """The first gradient leaves a part of the longer side's basis open: from equal bases all is the paper's."""
    shapes = [(6, 4), (4, 6)]
    bases = {size: torch.linalg.qr(seeded((size, size), 3, size, dtype=torch.float64)).Q for size in (4, 6)}

    def begin(optimizer):
        optimizer.param_groups[0]["step"] = 1
        for state in optimizer.state.values():
            for side in ("left", "right"):
                state[f"{side}_basis"][:] = bases[state[side].shape[-1]]

    got = train(shapes, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3, update_freq=3, prepare=begin)
    compare(got, shapes, update_freq=3, max_dim=100, bases=bases)


def test_first_step_only_initialises():
    got = train(steps=1, lr=0.1)
    assert all(
        torch.equal(w, seeded(s, 0, i, dtype=torch.float64)) for i, (s, w) in enumerate(zip(SHAPES, got, strict=True))
    )


@pytest.mark.parametrize("max_dim", [0, 100])
def test_identity_bases_are_adam(max_dim):
    """No side short enough for a basis, or bases that are never computed: Adam, one step later."""

    def late(optimizer):
        optimizer.param_groups[0]["step"] = (
            1  # the first gradients of all matrices come after the step that initialises
        )

    settings = dict(lr=0.1, betas=(0.8, 0.9), eps=1e-3, update_freq=10**9)
    got = train(max_dim=max_dim, prepare=late, **settings)
    weights = [nn.Parameter(seeded(s, 0, i, dtype=torch.float64)) for i, s in enumerate(SHAPES)]
    adam = torch.optim.Adam(weights, lr=0.1, betas=(0.8, 0.9), eps=1e-3)
    for t in range(STEPS):
        for i, w in enumerate(weights):
            w.grad = gradient(w.shape, t, i)
        adam.step()
    assert max(relative(a, b.detach()) for a, b in zip(got, weights, strict=True)) < 1e-12


def test_matrices_without_bases_are_work_too():
    """Of no FLOPs, all would go to one owner."""
    optimizer = SOAP([nn.Parameter(seeded((6, 4)))], max_dim=3)
    assert optimizer.flops(optimizer.param_groups[0], (6, 4)) > 0


def test_turned_gradients_give_turned_updates():
    """Unlike Adam's, the update of Q G P is Q U P, as long as the bases are exact."""

    def update(left, right):
        weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
        optimizer = SOAP([weight], lr=1.0, betas=(0.8, 0.9), update_freq=10**9)
        for t in range(STEPS):
            weight.grad = left @ gradient((6, 6), t, 0) @ right
            optimizer.step()
        return weight.detach()

    left, right = (torch.linalg.qr(seeded((6, 6), 9, i, dtype=torch.float64)).Q for i in range(2))
    eye = torch.eye(6, dtype=torch.float64)
    assert relative(update(left, right), left @ update(eye, eye) @ right) < 1e-6


@pytest.mark.parametrize("shape", [(12, 4), (4, 12)])
def test_rounding_does_not_choose_the_bases(shape):
    """Gradients that differ in the last bits, as over two numbers of ranks, give weights that differ as little."""

    def weights(noise):
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = SOAP([weight], lr=1.0, update_freq=5)
        for t in range(STEPS):
            weight.grad = gradient(shape, t, 0) * (1 + noise * seeded(shape, 50 + t, dtype=torch.float64))
            optimizer.step()
        return weight.detach()

    assert relative(weights(1e-14), weights(0.0)) < 1e-9


def test_bases_become_eigenvectors_and_stay_orthogonal():
    weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    optimizer = SOAP([weight], betas=(0.9, 0.999), update_freq=1)
    for t in range(300):
        weight.grad = gradient((6, 4), t % 3, 0)
        optimizer.step()
    state = optimizer.state[weight]
    for side in ("left", "right"):
        basis, stats = state[f"{side}_basis"][0], state[side][0]
        assert relative(basis.T @ basis, torch.eye(len(basis), dtype=torch.float64)) < 1e-12
        diagonal = basis.T @ stats @ basis
        assert (diagonal - diagonal.diag().diag()).norm() < 0.02 * diagonal.norm()
        assert (diagonal.diag().diff() <= 1e-3 * diagonal.norm()).all(), "sorted by eigenvalue"


def test_nan_stays_in_its_matrix():
    weights = [nn.Parameter(seeded((4, 4), 0, i)) for i in range(3)]
    optimizer = SOAP(weights, update_freq=1)
    for t in range(3):
        for i, w in enumerate(weights):
            w.grad = seeded((4, 4), 1 + t, i) * (float("nan") if (t, i) == (1, 1) or t == 0 and i == 2 else 1)
        optimizer.step()
    assert [bool(w.isfinite().all()) for w in weights] == [True, False, False]


def test_wrong_settings_are_named():
    for settings, words in [
        (dict(betas=(0.9, 1.0)), ("betas=(0.9, 1.0)", "[0, 1)")),
        (dict(update_freq=0), ("update_freq=0", "at least 1")),
    ]:
        with raises_naming(ValueError, *words):
            SOAP([{"params": [torch.nn.Parameter(torch.zeros(2, 2))], **settings}])
        with raises_naming(ValueError, *words):
            SOAP([nn.Parameter(torch.zeros(2, 2))], **settings)
