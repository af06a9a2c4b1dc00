"""Inverse roots against the spectrum they are made from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim import roots
from optim.roots import eigh, inverse_root, inverse_root_flops
from tests.optim.reference import seeded, svd_polar

METHODS = ["eigh", "newton"]


def with_spectrum(values, seed=0):
    """Q diag(values) Qᵀ and the function (values -> the matrix with those eigenvalues)."""
    basis = torch.linalg.qr(seeded((len(values), len(values)), seed, dtype=torch.float64)).Q
    return (basis * values) @ basis.mT, lambda new: (basis * new) @ basis.mT


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 12),
    st.integers(0, 999),
    st.integers(1, 8),
    st.floats(0, 4),
    st.floats(-8, 8),
    st.sampled_from(METHODS),
)
def test_the_power_undoes_the_root(n, seed, p, log_condition, log_scale, method):
    """X^p A = I, at any scale, for condition numbers up to 1e4."""
    values = torch.logspace(0, -log_condition, n, dtype=torch.float64) * 10**log_scale
    a, _ = with_spectrum(values, seed)
    root = inverse_root(a, 1 / p, method=method)
    identity = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.matrix_power(root, p) @ a, identity, rtol=0, atol=1e-9)
    torch.testing.assert_close(root, root.mT, rtol=1e-8, atol=1e-8 * root.abs().max().item())


@pytest.mark.parametrize(
    ("method", "log_condition", "bound"),
    [("eigh", 4, 2e-4), ("eigh", 6, 4e-2), ("newton", 4, 5e-5), ("newton", 6, 3e-3)],
)
def test_accuracy_of_the_fourth_root_in_float32(method, log_condition, bound):
    """Rounding limits both; the coupled iteration is several times as accurate."""
    values = torch.logspace(0, -log_condition, 64, dtype=torch.float64)
    a, rebuild = with_spectrum(values)
    error = relative(inverse_root(a.float(), 0.25, eps=1e-12, method=method), rebuild(values**-0.25))
    assert bound / 100 < error < bound


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("log_condition", "bound"), [(4, 1e-12), (10, 1e-6)])
def test_accuracy_in_float64(method, log_condition, bound):
    values = torch.logspace(0, -log_condition, 48, dtype=torch.float64)
    a, rebuild = with_spectrum(values)
    assert relative(inverse_root(a, 0.25, method=method), rebuild(values**-0.25)) < bound


def test_newton_reaches_the_root_without_eigh(monkeypatch):
    monkeypatch.setattr(roots, "_eigh_root", lambda *_: pytest.fail("fell back to eigh"))
    values = torch.logspace(0, -10, 32, dtype=torch.float64)
    a, rebuild = with_spectrum(values)
    for p in (1, 2, 3, 4, 8):
        assert relative(inverse_root(a, 1 / p, method="newton"), rebuild(values ** (-1 / p))) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_eigenvalues_without_eps_are_left_out(method, dtype):
    values = torch.tensor([3.0, 1.0, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    a, rebuild = with_spectrum(values)
    inverse = torch.where(values > 0, values**-0.5, 0.0)
    assert relative(inverse_root(a.to(dtype), 0.5, method=method), rebuild(inverse)) < 1e-5
    assert torch.equal(
        inverse_root(torch.zeros(2, 4, 4, dtype=dtype), 0.25, method=method), torch.zeros(2, 4, 4, dtype=dtype)
    )


@pytest.mark.parametrize("method", METHODS)
def test_eps_is_added_to_the_diagonal(method):
    values = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
    a, rebuild = with_spectrum(values)
    assert relative(inverse_root(a, 0.5, 0.25, method), rebuild((values + 0.25) ** -0.5)) < 1e-8


def test_eigenvalues_that_rounding_made_negative_count_as_zero():
    a, rebuild = with_spectrum(torch.tensor([4.0, 1.0, -1e-9], dtype=torch.float64))
    root = torch.tensor([0.5, 1.0, 1e3], dtype=torch.float64)
    assert relative(inverse_root(a, 0.5, eps=1e-6), rebuild(root)) < 1e-6


def test_any_exponent_by_eigh():
    values = torch.tensor([4.0, 1.0, 0.1], dtype=torch.float64)
    a, rebuild = with_spectrum(values)
    assert relative(inverse_root(a, 0.55), rebuild(values**-0.55)) < 1e-12


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7), (1, 4)])
def test_two_and_one_sided_roots_give_the_polar_factor(shape):
    """Shampoo without memory: (GGᵀ)^(-1/4) G (GᵀG)^(-1/4) = (GGᵀ)^(-1/2) G = UVᵀ."""
    g = seeded(shape, 3, dtype=torch.float64)
    left, right = inverse_root(g @ g.mT, 0.25), inverse_root(g.mT @ g, 0.25)
    assert relative(left @ g @ right, svd_polar(g)) < 1e-12
    assert relative(inverse_root(g @ g.mT, 0.5) @ g, svd_polar(g)) < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_stacks_and_matrices_that_are_not_finite(method, dtype):
    """A stack [2, 3, n, n]: one singular, one NaN, one infinite, each of another scale."""
    x = seeded((2, 3, 8, 12), 1, dtype=torch.float64)
    x[0, 1] *= 1e3
    stack = (x @ x.mT).to(dtype)
    stack[0, 2], stack[1, 0, 0, 0], stack[1, 1, 2, 2] = 0, math.nan, math.inf
    got = inverse_root(stack, 0.25, method=method)
    assert got.dtype == dtype
    assert got[1, 0].isnan().all() and got[1, 1].isnan().all() and torch.equal(got[0, 2], torch.zeros(8, 8).to(dtype))
    for i in [(0, 0), (0, 1), (1, 2)]:
        assert relative(got[i], inverse_root(stack[i].double(), 0.25)) < {8: 1e-9, 4: 1e-3, 2: 0.02}[dtype.itemsize]


@pytest.mark.parametrize("failure", ["raise", "nan"])
def test_a_failed_decomposition_is_tried_again_in_float64(monkeypatch, failure):
    original, dtypes = torch.linalg.eigh, []

    def failing(a):
        dtypes.append(a.dtype)
        if a.dtype == torch.float32:
            if failure == "raise":
                raise torch.linalg.LinAlgError("did not converge")
            return torch.full(a.shape[:-1], math.nan), torch.full(a.shape, math.nan)
        return original(a)

    a, rebuild = with_spectrum(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64))
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors = eigh(a.float())
    assert dtypes == [torch.float32, torch.float64] and values.dtype == vectors.dtype == torch.float32
    assert relative((vectors * values) @ vectors.mT, a) < 1e-6


def test_eigh_of_a_nan_is_nan_beside_others():
    stack = torch.eye(3).repeat(2, 1, 1)
    stack[0, 1, 1] = math.nan
    values, vectors = eigh(stack)
    assert values[0].isnan().all() and vectors[0].isnan().all()
    assert torch.equal(values[1], torch.ones(3))


def test_flops_grow_with_the_cube():
    for method in METHODS:
        assert inverse_root_flops(20, method) == 8 * inverse_root_flops(10, method) > 0


def test_impossible_requests_are_one_clear_line():
    a = torch.eye(2)
    for call, words in [
        (lambda: inverse_root(a, 0.25, method="cholesky"), "root=cholesky is unknown: choose one of eigh, newton"),
        (lambda: inverse_root_flops(2, "cholesky"), "root=cholesky is unknown"),
        (lambda: inverse_root(a, 0.0), "exponent > 0"),
        (lambda: inverse_root(a, 0.25, eps=-1.0), "eps >= 0"),
        (lambda: inverse_root(a, 0.3, method="newton"), "root=newton needs an exponent 1/p with a whole p, got 0.3"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("least", [-1e-3, 0.0, 0.02, 0.2])
def test_a_shift_lifts_the_least_eigenvalue_to_eps(least):
    values = torch.tensor([3.0, 1.0, 0.5, least], dtype=torch.float64)
    a, rebuild = with_spectrum(values)
    expected = rebuild((values + max(0.0, 0.1 - least)) ** -0.25)
    assert relative(inverse_root(a, 0.25, eps=0.1, method="eigh_shift"), expected) < 1e-12


def test_a_shift_from_rounding_in_float32():
    """Of a singular matrix with large entries the least eigenvalue is far below -eps."""
    thin = 100 * seeded((6, 2), 0)
    root = inverse_root(thin @ thin.mT, 0.25, eps=1e-12, method="eigh_shift")
    assert torch.linalg.matrix_norm(root, 2).item() == pytest.approx(1000, rel=1e-3)
