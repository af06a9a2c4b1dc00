"""Polar factors: laws, errors against a float64 SVD, and the two forms of the iteration against each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from optim.minimax import polar_express_coefficients
from optim.polar import POLAR_METHODS, Iteration, newton_schulz, polar, polar_flops
from tests.optim.reference import seeded, svd_polar

ITERATIONS = [name for name, method in POLAR_METHODS.items() if isinstance(method, Iteration)]
EXACT = [name for name in POLAR_METHODS if name not in ITERATIONS]
CONVERGED = {"svd": None, "eigh": None, "quintic": 30, "cubic": 60, "polar_express": 20, "polar_express_gram": 20}
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def matrix(shape, seed=0, dtype=torch.float64):
    return seeded(shape, seed, 0, dtype=dtype)


def orthogonal(n, seed):
    return torch.linalg.qr(matrix((n, n), seed)).Q


def spectrum(singular_values, n, seed=0):
    """U diag(s) Vᵀ with its polar factor."""
    m = len(singular_values)
    u, v = orthogonal(m, seed), torch.linalg.qr(matrix((n, m), seed + 1)).Q
    return (u * singular_values) @ v.mT, u @ v.mT


def sample(shape, seed):
    """A matrix of condition number 20, with its polar factor."""
    x, exact = spectrum(torch.linspace(1, 0.05, min(shape), dtype=torch.float64), max(shape), seed)
    return (x.mT, exact.mT) if shape[0] > shape[1] else (x, exact)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def error(approximation, exact):
    """‖X - UVᵀ‖_F/√rank."""
    return ((approximation.double() - exact).norm() / exact.norm()).item()


# Laws ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(SHAPES, st.integers(0, 999), st.sampled_from(list(POLAR_METHODS)))
def test_orthogonal_equivariance(shape, seed, method):
    """polar(QXR) = Q polar(X) R, for an iteration at any number of steps."""
    (x, _), left, right = sample(shape, seed), orthogonal(shape[0], seed + 2), orthogonal(shape[1], seed + 3)
    close(polar(left @ x @ right, method), left @ polar(x, method) @ right)


@settings(deadline=None, max_examples=20)
@given(SHAPES, st.integers(0, 999), st.sampled_from(list(POLAR_METHODS)), st.floats(-12, 12))
def test_scale_invariance_and_oddness(shape, seed, method, log_scale):
    x, _ = sample(shape, seed)
    close(polar(-(10**log_scale) * x, method), -polar(x, method))


@settings(deadline=None, max_examples=20)
@given(SHAPES, st.integers(0, 999), st.sampled_from(list(POLAR_METHODS)))
def test_transposition(shape, seed, method):
    x, _ = sample(shape, seed)
    close(polar(x.mT, method), polar(x, method).mT)


@settings(deadline=None, max_examples=20)
@given(SHAPES, st.integers(0, 999), st.sampled_from(list(CONVERGED)))
def test_converging_methods_reach_the_factor(shape, seed, method):
    x, exact = sample(shape, seed)
    close(polar(x, method, CONVERGED[method]), exact)


@pytest.mark.parametrize("method", list(POLAR_METHODS))
@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1)])
def test_vectors(method, shape):
    """The polar factor of a row or column is its direction; NS5 and cubic at their fixed number of steps come near."""
    x = matrix(shape)
    assert error(polar(x, method), x / x.norm()) < (0.35 if method == "newton_schulz5" else 0.1)


# Accuracy --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gaussian():
    x = matrix((768, 2304))
    return x.float(), polar(x, "eigh")


@pytest.mark.parametrize(
    ("method", "steps", "expected"),
    [
        ("newton_schulz5", 5, 0.171),
        ("cubic", 5, 0.748),
        ("quintic", 5, 0.240),
        ("polar_express", 5, 0.0966),
        ("polar_express_gram", 5, 0.0966),
    ],
)
def test_errors_of_a_gaussian_matrix(gaussian, method, steps, expected):
    """768×2304, a fused QKV of GPT-2."""
    x, exact = gaussian
    assert error(polar(x, method, steps), exact) == pytest.approx(expected, rel=0.02)


def test_the_list_of_the_paper_on_a_gaussian_matrix(gaussian):
    """With the paper's own safety factor, outside its recursion: .0907."""
    x, exact = gaussian
    fits = polar_express_coefficients(5, cushion=0.02407327424182761, safety=0.0)
    shrunk = [tuple(v / 1.01**power for v, power in zip(fit, (1, 3, 5), strict=True)) for fit in fits[:-1]]
    assert error(newton_schulz(x, [*shrunk, fits[-1]], 0.01), exact) == pytest.approx(0.0907, rel=0.02)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.025)])
def test_eight_steps_converge_as_far_as_the_dtype(dtype, bound):
    x = matrix((64, 192))
    assert error(polar(x.to(dtype), "polar_express", 8), svd_polar(x)) < bound


@pytest.mark.parametrize(
    ("condition", "method", "steps", "expected"),
    [
        (1e3, "newton_schulz5", 5, 0.40),
        (1e3, "polar_express", 5, 0.27),
        (1e3, "polar_express", 8, 0.0106),
        (1e6, "newton_schulz5", 5, 0.73),
        (1e6, "polar_express", 5, 0.70),
        (1e6, "polar_express", 8, 0.59),
    ],
)
def test_errors_of_ill_conditioned_matrices(condition, method, steps, expected):
    """Singular values spaced evenly in logarithm. At κ = 1e6 half of them are out of reach of 8 steps."""
    values = torch.logspace(0, -math.log10(condition), 256, dtype=torch.float64)
    x, exact = spectrum(values, 768)
    assert error(polar(x.float(), method, steps), exact) == pytest.approx(expected, rel=0.03)


def test_half_precision_turns_away_while_it_looks_more_orthogonal():
    """κ = 1e6 in bfloat16: more steps lower ‖XXᵀ - I‖ and raise the distance to the factor, so both must be watched."""
    x, exact = spectrum(torch.logspace(0, -6, 128, dtype=torch.float64), 256)
    few, many = (polar(x.bfloat16(), "polar_express", steps).double() for steps in (5, 8))
    identity = torch.eye(128, dtype=torch.float64)
    assert (many @ many.mT - identity).norm() < 0.95 * (few @ few.mT - identity).norm()
    assert error(many, exact) > 1.1 * error(few, exact)


def test_ns5_stays_within_its_band():
    x, _ = spectrum(torch.linspace(1, 0.02, 64, dtype=torch.float64), 64)
    values = torch.linalg.svdvals(polar(x, "newton_schulz5"))
    assert 0.66 < values.min() < 0.72 and 1.1 < values.max() < 1.21


@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_in_float32(method):
    values = torch.logspace(0, -3, 48, dtype=torch.float64)
    x, exact = spectrum(values, 96)
    assert error(polar(x.float(), method), exact) < 1e-3
    thin = x[:, :3] @ matrix((3, 20))
    u, s, vh = torch.linalg.svd(thin)
    assert error(polar(thin, method), u[:, :3] @ vh[:3]) < 1e-6, "null directions are left out"


# The Gram form ---------------------------------------------------------------------------------------------------

SPECTRA = {
    "gaussian": None,
    "condition 1e2": torch.logspace(0, -2, 64, dtype=torch.float64),
    "condition 1e6": torch.logspace(0, -6, 64, dtype=torch.float64),
    "one large": torch.cat([torch.ones(1), torch.full((63,), 1e-3)]).double(),
    "half rank": torch.cat([torch.ones(32), torch.full((32,), 1e-15)]).double(),
    "equal": torch.ones(64).double(),
}


@settings(deadline=None, max_examples=15)
@given(SHAPES, st.integers(0, 999), st.sets(st.integers(1, 6)))
def test_every_form_is_the_same_iteration(shape, seed, returns):
    (x, _), coefficients = sample(shape, seed), polar_express_coefficients(7)
    close(newton_schulz(x, coefficients, 0.02, sorted(returns)), newton_schulz(x, coefficients, 0.02))


@pytest.mark.parametrize("name", list(SPECTRA))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_automatic_gram_form_has_an_equal_error(name, dtype):
    x = matrix((64, 256)) if SPECTRA[name] is None else spectrum(SPECTRA[name], 256)[0]
    exact, coefficients = polar_svd_of_rank(x), polar_express_coefficients(5)
    assert polar_flops(x.shape, dtype=dtype) < 0.6 * polar_flops(x.shape, dtype=torch.bfloat16), "not the Gram form"
    standard = error(newton_schulz(x.to(dtype), coefficients, 0.02), exact)
    assert error(polar(x.to(dtype)), exact) == pytest.approx(standard, rel=0.03)


@pytest.mark.parametrize("name", list(SPECTRA))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("steps", [5, 8])
def test_the_gram_form_returns_to_x_often_enough(name, dtype, steps):
    x = matrix((64, 128)) if SPECTRA[name] is None else spectrum(SPECTRA[name], 128)[0]
    exact, coefficients = polar_svd_of_rank(x), polar_express_coefficients(steps)
    x = x.to(dtype)
    standard = error(newton_schulz(x, coefficients, 0.02), exact)
    slack = 0.05 if dtype == torch.bfloat16 else 0.01 if dtype == torch.float16 else 1e-3
    assert error(polar(x, "polar_express_gram", steps), exact) < 1.05 * standard + slack


def polar_svd_of_rank(x):
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (u * (s > 1e-10 * s[0])) @ vh


def test_nearly_square_matrices_and_half_precision_keep_the_standard_form():
    for shape, dtype in [((64, 64), torch.float32), ((64, 90), torch.float32), ((64, 256), torch.bfloat16)]:
        s, l = shape  # noqa: E741
        assert polar_flops(shape, dtype=dtype) == 5 * (4 * s * s * l + 2 * s**3)
    assert polar_flops((64, 256), steps=8) == 8 * (4 * 64 * 64 * 256 + 2 * 64**3), "8 steps would lose accuracy"


# Arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ITERATIONS)
@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (3, 40, 40), (2, 3, 10, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [None, 1, 4])
def test_flops_are_those_of_the_products_made(method, shape, dtype, steps):
    with FlopCounterMode(display=False) as counter:
        polar(torch.randn(shape, dtype=dtype), method, steps)
    assert counter.get_total_flops() == polar_flops(shape, method, steps, dtype)


def test_flops_by_formula():
    m = 32
    assert polar_flops((m, 4 * m), "newton_schulz5") == 90 * m**3
    assert polar_flops((m, 4 * m), "polar_express") == 50 * m**3
    assert polar_flops((5, 4 * m, m), "polar_express_gram") == 5 * 50 * m**3
    assert all(polar_flops((8, 16), method) > 0 for method in EXACT)


@pytest.mark.parametrize("method", ITERATIONS)
@pytest.mark.parametrize("shape", [(7, 130, 200), (40, 64, 64), (5, 300, 260), (3, 520, 64)])
def test_a_stack_is_its_matrices_bitwise(method, shape):
    x = torch.randn(shape)
    whole = polar(x, method)
    assert torch.equal(whole, torch.stack([polar(matrix, method) for matrix in x]))
    scattered = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2].copy_(x)
    assert torch.equal(whole, polar(scattered, method)), "the memory layout must not matter"


@pytest.mark.parametrize("rows", [191, 256, 300, 520])
def test_blocks_of_symmetric_products_cover_every_row(rows):
    """Wide enough for one to four blocks of the CPU's symmetric products."""
    x = matrix((rows, rows + 40))
    plain = x / (1.02 * x.norm())
    for a, b, c in polar_express_coefficients(5):
        gram = plain @ plain.mT
        plain = a * plain + (b * gram + c * gram @ gram) @ plain
    torch.testing.assert_close(newton_schulz(x, polar_express_coefficients(5), 0.02), plain, rtol=0, atol=1e-11)


# Edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(POLAR_METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zero_nan_and_infinite_matrices_keep_to_themselves(method, dtype):
    x = torch.randn(4, 5, 7).to(dtype)
    alone = polar(x[1], method)
    x[0], x[2, 3, 3], x[3, 0, 0] = 0, math.nan, math.inf
    y = polar(x, method)
    assert y.dtype == dtype and y.shape == x.shape
    assert torch.equal(y[0], torch.zeros(5, 7, dtype=dtype))
    assert error(y[1], alone.double()) < 0.02
    assert y[2].isnan().all() and y[3].isnan().all()


@pytest.mark.parametrize("method", list(POLAR_METHODS))
def test_tiny_matrices_do_not_explode(method):
    """Below the square root of the smallest float32 the norm is lost: the result may shrink, never grow."""
    for scale in (1e-15, 1e-20, 1e-30, 1e-44):
        y = polar(scale * matrix((4, 6), dtype=torch.float32), method)
        assert y.isfinite().all() and y.norm() < 2.5


@pytest.mark.parametrize("method", list(POLAR_METHODS))
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 4, 0)])
def test_empty_stacks(method, shape):
    assert polar(torch.zeros(shape), method).shape == shape


@pytest.mark.parametrize("method", list(POLAR_METHODS))
def test_the_argument_is_left_alone(method):
    x = matrix((6, 4)).requires_grad_()
    before = x.detach().clone()
    y = polar(x, method)
    assert torch.equal(x.detach(), before) and not y.requires_grad


@pytest.mark.parametrize("method", list(POLAR_METHODS))
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 130, 40), (5, 40, 130), (2, 3, 7, 5)])
def test_overwriting_the_argument_changes_no_bit(method, shape):
    x = torch.randn(shape)
    expected = polar(x, method)
    overwritten = polar(x, method, overwrite=True)
    assert torch.equal(overwritten, expected)
    assert method in EXACT or overwritten.data_ptr() == x.data_ptr()


def test_impossible_requests_are_one_clear_line():
    x = torch.zeros(3, 4)
    for call, words in [
        (lambda: polar(x, "qr"), "polar method 'qr' is unknown: choose one of polar_express, "),
        (lambda: polar(x, "cubic", 0), "'cubic' needs at least 1 step, got 0"),
        (lambda: polar(x, "cubic", 10**30), "'cubic' needs at least 1 step.*give 1 to 1000"),
        (lambda: polar(x, "svd", 5), "'svd' is exact: leave its number of steps unset, not 5"),
        (lambda: polar_flops((3, 4), "qr"), "'qr' is unknown"),
        (lambda: polar(x[0]), r"polar needs a matrix or a stack of matrices, got shape \(4,\)"),
        (lambda: newton_schulz(x, [(1.5, -0.5, 0.0)], form="grim"), "form=grim is unknown"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
