"""The statistics of a comparison: costs to a target, means over seeds, speed-ups, and the speedrun's tests.

Every function takes plain numbers, one per seed. None means "these numbers do not allow it", never "no effect".
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95
ALPHA = 0.01  # the speedrun's level for "below the target" (modded-nanogpt, track 1)
# Track 3 asks for (target - mean)·√n ≥ 0.004 at σ = 0.0013: in standard errors, z ≥ 3.08 (p ≈ 0.001).
Z_LIMIT = 0.004 / 0.0013


@dataclass(frozen=True)
class Estimate:
    """Mean over `n` seeds with its standard error s/√n (None for one seed)."""

    mean: float
    error: float | None
    n: int


@dataclass(frozen=True)
class Ratio:
    """A speed-up with its interval; without one where a side has a single seed or neither has any spread."""

    value: float
    low: float | None
    high: float | None


def estimate(values: Sequence[float]) -> Estimate | None:
    if not values:
        return None
    error = float(stats.sem(values)) if len(values) > 1 else None
    return Estimate(math.fsum(values) / len(values), error, len(values))


def speedup(baseline: Sequence[float], values: Sequence[float]) -> Ratio | None:
    """Geometric mean of `baseline` over that of `values`, with Welch's t interval on the logarithms.

    On the logarithms a ratio becomes a difference, so the interval is never negative or unbounded (Fieller's can
    be), and exchanging the two sides inverts it exactly. Assumes independent seeds and roughly log-normal costs.
    """
    if not baseline or not values or min(*baseline, *values) <= 0:
        return None
    a, b = [math.log(x) for x in baseline], [math.log(x) for x in values]
    value = math.exp(math.fsum(a) / len(a) - math.fsum(b) / len(b))
    if not _testable(a, b):
        return Ratio(value, None, None)
    interval = _welch(a, b).confidence_interval(CONFIDENCE)
    return Ratio(value, math.exp(interval.low), math.exp(interval.high))


def below_target(losses: Sequence[float], target: float) -> float | None:
    """p of the one-sided one-sample t-test of "mean final loss < target"; None without spread over seeds."""
    if len(losses) < 2 or not _spread(losses):
        return None
    return float(stats.ttest_1samp(losses, target, alternative="less").pvalue)


def differ(a: Sequence[float], b: Sequence[float]) -> float | None:
    """p of Welch's two-sided t-test of equal means; None where a side has one seed or nothing varies."""
    return float(_welch(a, b).pvalue) if _testable(a, b) else None


def welch_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float] | None:
    """Welch's 95% interval of mean(a) - mean(b); None where there is no test."""
    if not _testable(a, b):
        return None
    interval = _welch(a, b).confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


def z_below_target(losses: Sequence[float], target: float, sigma: float) -> float:
    """(target - mean)·√n / σ for a known σ; track 3's rule is z ≥ Z_LIMIT."""
    return (target - math.fsum(losses) / len(losses)) * math.sqrt(len(losses)) / sigma


@dataclass(frozen=True)
class Reached:
    """The evaluated step at which a mean over `n` seeds is first below a target by track 3's rule."""

    step: int
    mean: float
    n: int
    z: float


def first_below_target(
    steps: Sequence[int], means: Sequence[float], n: int, target: float, sigma: float
) -> Reached | None:
    """The earliest of the steps that are common to all `n` seeds with (target - mean)·√n / σ ≥ Z_LIMIT."""
    for step, mean in zip(steps, means, strict=True):
        z = (target - mean) * math.sqrt(n) / sigma
        if z >= Z_LIMIT:
            return Reached(step, mean, n, z)
    return None


def z_better(
    losses: Sequence[float],
    baseline: Sequence[float],
    sigma: float,
    steps_saved: float = 0,
    loss_per_step: float = 0,
) -> float:
    """(Δloss + Δsteps·loss_per_step) / (σ·√(1/n₁ + 1/n₂)): track 3's pairwise rule is ≥ Z_LIMIT.

    `loss_per_step` is what a step of training is worth near the target (track 3: 0.0045 per 100 steps).
    """
    gain = math.fsum(baseline) / len(baseline) - math.fsum(losses) / len(losses) + steps_saved * loss_per_step
    return gain / (sigma * math.sqrt(1 / len(losses) + 1 / len(baseline)))


def z_pvalue(z: float) -> float:
    """One-sided p of a z."""
    return float(stats.norm.sf(z))


def holm(pvalues: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment for several tests against one baseline; None stays None and is not counted."""
    order = sorted((p, i) for i, p in enumerate(pvalues) if p is not None)
    adjusted: list[float | None] = [None] * len(pvalues)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = highest
    return adjusted


def _welch(a: Sequence[float], b: Sequence[float]):
    with warnings.catch_warnings():
        # scipy warns of one side without spread, which is sound here: the other side has some (_testable).
        warnings.simplefilter("ignore", RuntimeWarning)
        return stats.ttest_ind(a, b, equal_var=False)


def _testable(a: Sequence[float], b: Sequence[float]) -> bool:
    """Two seeds a side, and some spread: equal values would make every difference infinitely significant."""
    return min(len(a), len(b)) >= 2 and (_spread(a) or _spread(b))


def _spread(values: Sequence[float]) -> bool:
    return varies(values, max(abs(value) for value in values))


def varies(values: Sequence[float], sized: float) -> bool:
    """Whether the values differ by more than the rounding of numbers as large as ``sized``."""
    return max(values) - min(values) > 1e-9 * sized
