"""Laws of norms, duals and linear minimization oracles, and the table of formulas they come from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.lmo import NORMS, dual_norm, lmo, norm
from optim.polar import polar
from tests.optim.reference import seeded, svd_polar

KINDS = st.sampled_from(list(NORMS))
SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7))
SEEDS = st.integers(0, 999)
VECTOR_KINDS = [kind for kind, entry in NORMS.items() if not entry.of_matrices]
PERMUTED_ONLY = ("l1", "linf", "one_to_rms", "rms_to_inf")  # norms that a rotation changes


def matrix(shape, seed):
    return seeded(shape, seed, dtype=torch.float64)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=60)
@given(SHAPES, SEEDS, KINDS)
def test_the_oracle_attains_the_dual_norm_on_the_unit_ball(shape, seed, kind):
    """‖LMO(G)‖ = 1 and <G, LMO(G)> = -‖G‖_dual."""
    g = matrix(shape, seed)
    w = lmo(g, kind)
    close(norm(w, kind), torch.tensor(1.0, dtype=torch.float64))
    close((g * w).sum(), -dual_norm(g, kind))


@settings(deadline=None, max_examples=60)
@given(SHAPES, SEEDS, KINDS)
def test_hoelder(shape, seed, kind):
    """|<G, W>| <= ‖G‖_dual ‖W‖ for every W: so the dual is an upper bound, not only attained."""
    g, w = matrix(shape, seed), matrix(shape, seed + 1)
    assert (g * w).sum().abs() <= dual_norm(g, kind) * norm(w, kind) * (1 + 1e-12)


@settings(deadline=None, max_examples=30)
@given(SHAPES, SEEDS, KINDS, st.floats(-6, 6))
def test_norm_axioms(shape, seed, kind, log_scale):
    x, y, scale = matrix(shape, seed), matrix(shape, seed + 1), 10**log_scale
    for size in (norm, dual_norm):
        close(size(-scale * x, kind) / scale, size(x, kind))
        assert size(x + y, kind) <= (size(x, kind) + size(y, kind)) * (1 + 1e-12)
        assert size(torch.zeros(shape), kind) == 0


@settings(deadline=None, max_examples=40)
@given(SHAPES, SEEDS, KINDS, st.floats(-6, 6))
def test_the_oracle_sees_the_direction_alone(shape, seed, kind, log_scale):
    """LMO(cG) = LMO(G) for c > 0; LMO(-G) = -LMO(G)."""
    g = matrix(shape, seed)
    close(lmo(10**log_scale * g, kind), lmo(g, kind))
    close(lmo(-g, kind), -lmo(g, kind))


@settings(deadline=None, max_examples=40)
@given(SHAPES, SEEDS, KINDS)
def test_invariance(shape, seed, kind):
    """LMO(QGR) = Q LMO(G) R: orthogonal Q, R where the norm allows it, signed permutations otherwise."""
    g = matrix(shape, seed)
    left, right = (torch.linalg.qr(matrix((n, n), seed + i)).Q for i, n in enumerate(shape, 1))
    if kind in PERMUTED_ONLY:
        left, right = (q.sign() * torch.eye(len(q))[torch.randperm(len(q))].double() for q in (left, right))
    close(lmo(left @ g @ right, kind), left @ lmo(g, kind) @ right)
    close(norm(left @ g @ right, kind), norm(g, kind))


@settings(deadline=None, max_examples=30)
@given(SHAPES, SEEDS, KINDS, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_a_stack_is_its_matrices(shape, seed, kind, dtype):
    stack = matrix((2, 3, *shape), seed).to(dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else 0.02
    for f in (norm, dual_norm, lmo):
        one_by_one = torch.stack([torch.stack([f(x, kind) for x in row]) for row in stack])
        close(f(stack, kind), one_by_one, tolerance)
    assert lmo(stack, kind).dtype == dtype and lmo(stack, kind).shape == stack.shape
    assert norm(stack, kind).dtype == torch.promote_types(dtype, torch.float32)


# -LMO(G), ‖G‖_dual, ‖G‖ in terms of singular values s, or of columns and rows.
M, N = 3, 5
TABLE = {
    "l1": (
        lambda g: torch.where(g.abs() == g.abs().max(), g.sign(), 0.0),
        lambda g, s: g.abs().max(),
        lambda g, s: g.abs().sum(),
    ),
    "l2": (lambda g: g / g.norm(), lambda g, s: g.norm(), lambda g, s: g.norm()),
    "frobenius": (lambda g: g / g.norm(), lambda g, s: g.norm(), lambda g, s: g.norm()),
    "linf": (torch.sign, lambda g, s: g.abs().sum(), lambda g, s: g.abs().max()),
    "rms": (lambda g: 15**0.5 * g / g.norm(), lambda g, s: 15**0.5 * g.norm(), lambda g, s: g.square().mean().sqrt()),
    "spectral": (svd_polar, lambda g, s: s.sum(), lambda g, s: s[0]),
    "nuclear": (lambda g: torch.outer(*top(g)), lambda g, s: s[0], lambda g, s: s.sum()),
    "rms_to_rms": (
        lambda g: (M / N) ** 0.5 * svd_polar(g),
        lambda g, s: (M / N) ** 0.5 * s.sum(),
        lambda g, s: (N / M) ** 0.5 * s[0],
    ),
    "one_to_rms": (
        lambda g: M**0.5 * g / g.norm(dim=0, keepdim=True),
        lambda g, s: M**0.5 * g.norm(dim=0).sum(),
        lambda g, s: g.norm(dim=0).max() / M**0.5,
    ),
    "rms_to_inf": (
        lambda g: g / g.norm(dim=1, keepdim=True) / N**0.5,
        lambda g, s: g.norm(dim=1).sum() / N**0.5,
        lambda g, s: g.norm(dim=1).max() * N**0.5,
    ),
}


def top(g):
    """Singular vectors by power iteration, u and v."""
    v = torch.ones(N, dtype=g.dtype)
    for _ in range(3000):
        v = g.mT @ (g @ v)
        v = v / v.norm()
    return (g @ v) / (g @ v).norm(), v


def test_the_table_is_complete():
    assert set(TABLE) == set(NORMS)


@pytest.mark.parametrize("kind", list(TABLE))
def test_the_table(kind):
    g = matrix((M, N), 1)
    ascent, dual, size = TABLE[kind]
    s = torch.linalg.svdvals(g)
    close(-lmo(g, kind), ascent(g))
    close(dual_norm(g, kind), dual(g, s))
    close(norm(g, kind), size(g, s))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), SEEDS, st.sampled_from(VECTOR_KINDS))
def test_vectors(n, seed, kind):
    g = matrix((n,), seed)
    w = lmo(g, kind)
    close(norm(w, kind), torch.tensor(1.0, dtype=torch.float64))
    close((g * w).sum(), -dual_norm(g, kind))
    close(w, lmo(g[None], kind)[0])
    close(norm(g, kind), norm(g[:, None], kind))


@pytest.mark.parametrize("kind", list(NORMS))
@pytest.mark.parametrize("method", ["svd", "eigh", "polar_express"])
def test_zero_and_nan(kind, method):
    g = torch.randn(3, 4, 6)
    g[0], g[2] = 0, math.nan
    w = lmo(g, kind, method)
    assert torch.equal(w[0].abs(), torch.zeros(4, 6))
    assert w[1].isfinite().all()
    assert w[2].isnan().any() and norm(g, kind)[2].isnan() and dual_norm(g, kind)[2].isnan()


def test_the_first_of_equal_entries_is_taken():
    assert torch.equal(lmo(torch.tensor([[1.0, -2.0], [2.0, 2.0]]), "l1"), torch.tensor([[0.0, 1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("kind", ["spectral", "rms_to_rms"])
def test_the_polar_method_is_the_callers(kind):
    g = matrix((4, 9), 1)
    scale = 1 if kind == "spectral" else 2 / 3
    close(lmo(g, kind, "newton_schulz5", 3), -scale * polar(g, "newton_schulz5", 3), 1e-12)
    close(lmo(g, kind), -scale * svd_polar(g), 1e-12)


def test_impossible_requests_are_one_clear_line():
    with pytest.raises(ValueError, match="norm 'l3' is unknown: choose one of l1, l2"):
        lmo(torch.zeros(2, 2), "l3")
    for f in (norm, dual_norm, lmo):
        with pytest.raises(ValueError, match=r"'spectral' does not apply to a tensor of shape \(3,\)"):
            f(torch.zeros(3), "spectral")
        with pytest.raises(ValueError, match=r"'l2' does not apply to a tensor of shape \(\)"):
            f(torch.tensor(1.0), "l2")
