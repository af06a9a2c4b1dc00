"""Gradients at the ends of float32's range, rows of zeros, settings that schedulers make, and settings as tensors."""

import copy
from inspect import signature

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optim import SOAP, Lion, Muon, NorMuon, PSGDKron, Scion, Shampoo, Signum, Steepest
from optim.elementwise import Elementwise
from optim.limits import largest, limit_entries, limit_matrices
from optim.lmo import NORMS, dual_norm, lmo, norm
from optim.minimax import polar_express_coefficients
from optim.polar import POLAR_METHODS, polar, power_of_two
from tests.optim.reference import seeded
from tests.optim.rules import find_rules

POWERS = [120, 66, -66, -80, -110]  # 2^66 = 7e19, 2^-80 = 8e-25


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("method", [name for name in POLAR_METHODS if name not in ("svd", "eigh")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_polar_factor_does_not_depend_on_a_power_of_two(method, power, dtype):
    x = seeded((2, 6, 4), 0).to(dtype)
    scaled = x * 2.0**power
    assert torch.equal(polar(scaled, method), polar(x, method))
    beside = torch.stack([x[0], scaled[1]])  # and each matrix has a scale of its own
    assert torch.equal(polar(beside, method), polar(x, method))


def test_the_largest_entry_is_scaled_to_below_one():
    for power in (0, 40, -40, 60, 120, -120):
        x = seeded((3, 4, 5), 0) * 2.0**power
        factor = power_of_two(x)
        assert factor.frexp().mantissa.eq(0.5).all() and torch.equal(x * factor / factor, x)
        largest = (x * factor).abs().amax((1, 2))
        assert largest.ge(0.5).all() and largest.lt(1).all()
    odd = torch.zeros(3, 2, 2)
    odd[1], odd[2] = torch.inf, torch.nan
    assert power_of_two(odd)[:2].isfinite().all()
    assert torch.equal(polar(torch.zeros(2, 2)), torch.zeros(2, 2)) and polar(odd)[1:].isnan().all()


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("kind", list(NORMS))
def test_norms_and_oracles_keep_their_scale(kind, power):
    x, scale = seeded((5, 4), 0), 2.0**power
    torch.testing.assert_close(lmo(x * scale, kind), lmo(x, kind))
    for size in (norm, dual_norm):
        want = size(x, kind).double() * scale
        torch.testing.assert_close(size(x * scale, kind).double(), want, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("cls", [Muon, NorMuon, Scion, Steepest, Lion, Signum])
def test_a_step_has_its_length_at_any_size_of_the_gradient(cls, power):
    steps = []
    for scale in (1.0, 2.0**power):
        weight = nn.Parameter(torch.zeros(5, 4))
        optimizer = cls([weight], lr=0.1)
        for t in range(3):
            weight.grad = seeded((5, 4), t) * scale
            optimizer.step()
        steps.append(weight.detach())
    torch.testing.assert_close(*steps)
    assert steps[0].abs().max() > 0


@pytest.mark.parametrize("cls", [*find_rules(), *find_rules(Elementwise)])
def test_weights_and_state_stay_finite_at_any_size_of_the_gradient(cls):
    """Up to what float32 holds where squares are limited; momentum, which adds up, needs some room."""
    for scale in (
        1e-38,
        1e-20,
        1e9,
        1e13,
        2e18,
        1e19,
        1e28,
        2e36,
        *([3.4e38] if cls.squares and cls is not PSGDKron else []),
    ):
        weight = nn.Parameter(seeded((5, 4), 9))
        optimizer = cls([weight])
        for t in range(6):
            weight.grad = seeded((5, 4), t).clamp(-1, 1) * scale
            optimizer.step()
        assert weight.isfinite().all(), scale
        assert all(value.isfinite().all() for value in optimizer.state[weight].values()), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_squares_hold_keeps_its_bits_and_what_is_not_finite_stays_so(dtype):
    x = seeded((4, 6, 5), 0).to(dtype)
    x[1] *= 30 if dtype == torch.float16 else 1e16
    matrices, entries = x.clone(), limit_entries([x])[0]
    limit_matrices(matrices)
    for kept in (matrices, entries):
        assert torch.equal(kept.view(torch.uint8), x.view(torch.uint8))
    x[2, 0, 0], x[3, 1, 1] = torch.inf, torch.nan
    entries = limit_entries([x])[0]
    limit_matrices(x)
    assert not x[2].isfinite().all() and not x[3].isfinite().all() and not entries[2:].isfinite().all((1, 2)).any()


@pytest.mark.parametrize("power", [62, 100, 127])
def test_a_matrix_that_is_limited_keeps_its_direction(power):
    """And one beside it its bits; an entry is limited by itself."""
    x = seeded((2, 6, 5), 0).clamp(-0.99, 0.99)
    large = torch.stack([x[0], x[1] * 2.0**power])
    (entries,) = limit_entries([large])
    assert entries[1].abs().max() <= largest(torch.float32) and torch.equal(entries[1].sign(), x[1].sign())
    limit_matrices(large)
    assert torch.equal(large[0], x[0]) and 2.0**50 < large[1].norm() <= 2.0**59
    torch.testing.assert_close(large[1] / large[1].norm(), x[1] / x[1].norm())


@pytest.mark.parametrize("cls", [*find_rules(), *find_rules(Elementwise)])
def test_without_eps_nothing_is_divided_by_zero(cls):
    """Neither where a row has no gradient nor where nothing has one yet."""
    settings = {key: 0.0 for key in ("eps", "graft_eps") if key in signature(cls).parameters}
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = cls([weight], **settings)
    for grad in (torch.zeros(4, 3), seeded((4, 3), 1)):
        weight.grad = grad
        weight.grad[1] = 0
        optimizer.step()
        assert weight.isfinite().all()
    if cls is NorMuon:
        assert torch.equal(weight[1].detach(), torch.ones(3))


@pytest.mark.parametrize("cls", [*find_rules(), *find_rules(Elementwise)])
@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-5, 1e-3, 1.0, 1e4])
def test_weights_in_half_precision_stay_finite(cls, scale):
    """In float16 the usual eps is 0, and so are squares below 2e-4."""
    weight = nn.Parameter(seeded((4, 3), 0).half())
    optimizer = cls([weight])
    for t in range(4):
        weight.grad = (seeded((4, 3), 1 + t) * scale).half()
        optimizer.step()
    assert weight.isfinite().all() and (weight - seeded((4, 3), 0)).abs().max() < 1


@pytest.mark.parametrize(
    ("cls", "kwargs"), [(Steepest, {"momentum": 0.0}), (Shampoo, {"betas": (0.0, 0.9)}), (SOAP, {"betas": (0.0, 0.9)})]
)
def test_a_scheduler_may_bring_momentum(cls, kwargs):
    weights = [nn.Parameter(seeded((4, 3), 0, i)) for i in range(2)]
    optimizer = cls([{"params": weights[:1]}, {"params": weights[1:]}], **kwargs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    for t in range(5):
        for weight in weights:
            weight.grad = seeded((4, 3), 1 + t)
        optimizer.step()
        schedule.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert all("momentum" in state for state in saved["state"].values())
    other = cls([{"params": [nn.Parameter(w.detach().clone())]} for w in weights], **kwargs)
    other.load_state_dict(saved)
    for one in (optimizer, other):
        for group in one.param_groups:
            group["params"][0].grad = seeded((4, 3), 9)
        one.step()
    for a, b in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert torch.equal(a["params"][0], b["params"][0])


@pytest.mark.parametrize("cls", [*find_rules(), *find_rules(Elementwise)])
def test_lr_may_be_a_tensor(cls):
    results = []
    for lr in (0.25, torch.tensor(0.25), torch.tensor([0.25])):
        weight = nn.Parameter(seeded((4, 3), 0))
        optimizer = cls([weight], lr=lr)
        for t in range(2):
            weight.grad = seeded((4, 3), 1 + t)
            optimizer.step()
        results.append(weight.detach())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 24),
    st.floats(-7, -0.01),
    st.one_of(st.just(0.0), st.floats(0.0, 0.95)),
    st.one_of(st.just(0.0), st.floats(1e-6, 0.5)),
)
def test_coefficients_exist_for_every_setting(steps, log_lower, cushion, safety):
    assert len(polar_express_coefficients(steps, 10**log_lower, cushion, safety)) == steps
    assert len(polar_express_coefficients(12, 1e-4, 0.02, 0.01)) == 12
