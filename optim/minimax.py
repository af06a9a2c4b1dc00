"""Coefficients of Polar Express (Amsel, Persson, Musco, Gower, arXiv 2505.16932, §3 and Algorithm 1)."""

import math
from functools import lru_cache

Quintic = tuple[float, float, float]
"""(a, b, c) of the odd polynomial a·x + b·x³ + c·x⁵."""

CONVERGED = 1 - 5e-6
"""Above this ratio lower/upper the equioscillation system is singular to rounding; its limit is known."""


def evaluate(coefficients: Quintic, x: float) -> float:
    a, b, c = coefficients
    square = x * x
    return x * (a + square * (b + square * c))


def minimax_quintic(lower: float, upper: float) -> Quintic:
    """The odd quintic p that minimises max |p(x) - 1| over [lower, upper], by Remez exchange.

    p equioscillates at the two ends and at its two inner extrema (paper, §3.2), so each exchange solves a 4×4 linear
    system for (a, b, c, error) and moves the inner points to the roots of p'.
    Raises ValueError unless 0 < lower <= upper.
    """
    if not 0 < lower <= upper:
        raise ValueError(f"minimax_quintic needs 0 < lower <= upper, got lower={lower}, upper={upper}")
    if lower / upper >= CONVERGED:  # the polynomial whose first two derivatives vanish at p(upper) = 1
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    lower /= upper  # solved on [lower/upper, 1], where the system is well scaled, and stretched at the end
    inner, last_error = ((3 * lower + 1) / 4, (lower + 3) / 4), math.inf
    for _ in range(100):
        points = (lower, *inner, 1.0)
        a, b, c, error = _solve([[x, x**3, x**5, sign, 1.0] for x, sign in zip(points, (1, -1, 1, -1), strict=True)])
        if abs(error - last_error) <= 1e-15:
            break
        root = math.sqrt(max(0.0, 9 * b * b - 20 * a * c))  # rounding may make it negative on a short interval
        inner = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
        last_error = error
    return a / upper, b / upper**3, c / upper**5


def _solve(rows: list[list[float]]) -> list[float]:
    """x of A x = y, from the rows of [A | y], by Gauss-Jordan elimination with partial pivoting: by hand, so that the
    coefficients are the same on every machine, and exist also while tensors are fake or traced."""
    for k in range(len(rows)):
        sizes = [abs(row[k]) for row in rows[k:]]
        pivot = rows.pop(k + sizes.index(max(sizes)))
        pivot = [x / pivot[k] for x in pivot]
        rows = [[x - row[k] * y for x, y in zip(row, pivot, strict=True)] for row in rows]
        rows.insert(k, pivot)
    return [row[-1] for row in rows]


@lru_cache(maxsize=64)
def polar_express_coefficients(
    steps: int, lower: float = 1e-3, cushion: float = 0.02, safety: float = 0.02
) -> tuple[Quintic, ...]:
    """The greedy composition of minimax quintics that sends singular values in [lower, 1] to 1.

    Each polynomial is fitted to the interval that the ones before it leave, [l, u] with u = 2 - l.
    `cushion` fits it to [max(l, cushion·u), u] instead and rescales it to be centred on [l, u] again: without it the
    values just above l overshoot in half precision. `safety` evaluates every polynomial but the last at x/(1 + safety),
    so that rounding cannot push a value above u; the caller divides the input by (1 + safety) too.
    (lower, cushion, safety) = (1e-3, 0.02, 0.02) with 5 steps is the list of modded-nanogpt, dion and nanochat;
    (1e-3, 0.02407327424182761, 0) with 7 steps is the list printed in the paper, before its own safety factor 1.01.
    Raises ValueError where an argument is out of range.
    """
    if steps < 1 or not 0 < lower <= 1 or not 0 <= cushion < 1 or safety < 0:
        raise ValueError(
            "polar_express_coefficients needs steps >= 1, 0 < lower <= 1, 0 <= cushion < 1 and safety >= 0, "
            f"got steps={steps}, lower={lower}, cushion={cushion}, safety={safety}"
        )
    upper: float = 1.0
    result: list[Quintic] = []
    for step in range(steps):
        fit = minimax_quintic(max(lower, cushion * upper), upper)
        if cushion * upper > lower:
            centre = (evaluate(fit, lower) + evaluate(fit, upper)) / 2
            fit = _divided(fit, (centre, centre, centre))
        # The interval follows the shrunk polynomial even where the last one, published unshrunk, ends the list.
        shrunk = _divided(fit, (1 + safety, (1 + safety) ** 3, (1 + safety) ** 5))
        result.append(shrunk if step < steps - 1 else fit)
        lower = min(evaluate(shrunk, lower), 1.0)  # rounding may carry it past upper
        upper = 2 - lower
    return tuple(result)


def _divided(x: Quintic, y: Quintic) -> Quintic:
    return x[0] / y[0], x[1] / y[1], x[2] / y[2]
