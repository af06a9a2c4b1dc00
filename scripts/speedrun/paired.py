"""Two groups at the same seeds: what a seed brings to both sides, its batches and initial weights, cancels.

A difference of final losses, what it is worth in steps, and how many seeds would find a difference worth finding.
None means "these numbers do not allow it", never "no effect".
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from trainer.metrics.summary import crossing

from .groups import Group
from .records import Run
from .statistics import ALPHA, CONFIDENCE, varies, welch_interval

POWER = 0.8  # the share of studies that find the gain that was planned for
MOST_SEEDS = 1000
PILOT = 3  # pairs, the fewest whose spread says how many more it takes


@dataclass(frozen=True)
class Difference:
    """A mean over pairs, its 95% interval, and the two-sided p of "it is 0" by Student's t over the pairs."""

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Pairs:
    """A group against the baseline at their ``n`` common seeds.

    loss: final loss less the baseline's. steps: what that is worth, above 0 where the group is ahead.
    welch: the interval of ``loss`` if the seeds were not paired.
    worth: the planned gain in loss. seeds: how many a side needs in all to find it.
    """

    n: int
    loss: Difference
    welch: tuple[float, float] | None
    steps: Difference
    worth: float | None
    seeds: int | None


def compare(group: Group, baseline: Group, gain: float, tests: int = 1, loss_per_step: float = 0) -> Pairs | None:
    """Pair the runs by seed; None with fewer than two common seeds, or after different numbers of steps.

    Args:
        gain: the smallest one worth finding, as a share of the steps.
        tests: comparisons on the page, over which the level is shared.
        loss_per_step: what a step is worth in loss; by default it is read off the curves.
    """
    theirs = {run.seed: run for run in baseline.runs}
    pairs = [(run, theirs[run.seed]) for run in group.runs if run.seed in theirs]
    if len(pairs) < 2 or group.planned_steps != baseline.planned_steps:
        return None
    mine, others = [run.losses[-1] for run, _ in pairs], [run.losses[-1] for _, run in pairs]
    gaps = [a - b for a, b in zip(mine, others, strict=True)]
    sized = max(map(abs, mine + others))  # of losses: rounding is relative to it, not to their differences
    gained = [-gap / loss_per_step for gap in gaps] if loss_per_step else [steps_gained(*pair) for pair in pairs]
    worth = worth_in_loss(baseline, gain)
    seeds = None
    if worth and len(gaps) >= PILOT and varies(gaps, sized):
        seeds = seeds_needed(worth, float(stats.tstd(gaps)), len(gaps), ALPHA / tests)
    return Pairs(
        len(pairs), difference(gaps, sized), welch_interval(mine, others), difference(gained, group.planned_steps),
        worth, seeds,
    )  # fmt: skip


def difference(gaps: Sequence[float], sized: float) -> Difference:
    """Student's t over the pairs; gaps that agree to rounding of numbers as large as ``sized`` allow no test."""
    mean = math.fsum(gaps) / len(gaps)
    if len(gaps) < 2 or not varies(gaps, sized):
        return Difference(mean)
    found = stats.ttest_1samp(gaps, 0)
    interval = found.confidence_interval(CONFIDENCE)
    return Difference(mean, float(interval.low), float(interval.high), float(found.pvalue))


def steps_gained(run: Run, other: Run) -> float:
    """How many steps before its end the better of two runs had reached the final loss of the other; below 0 where
    ``other`` is the better one.

    A run planned to be as short would have decayed its learning rate by then: the true figure is rather larger.
    """
    sign, ahead, behind = (1, run, other) if run.losses[-1] <= other.losses[-1] else (-1, other, run)
    reached = crossing(ahead.steps, ahead.losses, behind.losses[-1])
    return sign * (ahead.steps[-1] - reached.interpolated) if reached else 0.0


def worth_in_loss(baseline: Group, gain: float) -> float | None:
    """How far the baseline's mean loss falls over the last ``gain`` (a share) of its steps; None if it does not."""
    curve = baseline.curve()
    steps, losses = curve["steps"], curve["mean"]
    start = steps[-1] * (1 - gain)
    i = next(i for i, step in enumerate(steps) if step >= start)
    before = losses[i]
    if i and steps[i] > start:
        share = (steps[i] - start) / (steps[i] - steps[i - 1])
        before += share * (losses[i - 1] - losses[i])
    return before - losses[-1] if before > losses[-1] else None


def seeds_needed(worth: float, deviation: float, pilot: int, alpha: float = ALPHA) -> int | None:
    """Pairs with which a paired t-test at level ``alpha`` finds a mean difference ``worth`` with 80% power.

    ``deviation`` of the differences, estimated from ``pilot`` pairs, is replaced by its upper 80% confidence limit:
    half of all small pilots see less spread than there is (Browne, Statistics in Medicine 14, 1995).
    """
    freedom = pilot - 1
    deviation *= math.sqrt(freedom / stats.chi2.ppf(1 - POWER, freedom))
    counts = range(2, MOST_SEEDS + 1)
    i = bisect_left(counts, POWER, key=lambda n: power(n, worth / deviation, alpha))
    return counts[i] if i < len(counts) else None


def power(n: int, effect: float, alpha: float) -> float:
    """Of a two-sided paired t-test over n pairs, for a mean difference of ``effect`` standard deviations."""
    limit, shift = stats.t.isf(alpha / 2, n - 1), effect * math.sqrt(n)
    return float(stats.nct.sf(limit, n - 1, shift) + stats.nct.cdf(-limit, n - 1, shift))
