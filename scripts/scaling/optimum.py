"""The best learning rate of a row of runs, how it drifts with the width, and how sure that is.

Learning rates are log2 of their factor.  NaN is the loss of a run that diverged.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 1000
LEAST_SEEDS = 3  # with fewer there is hardly anything to draw from
Losses = np.ndarray  # [widths, lrs, seeds]


def optimum(lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    """Vertex of the parabola through the lowest loss and its two neighbours; the lowest itself where a neighbour
    diverged.  None: the lowest is at an end, or everything diverged."""
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    i = int(np.argmin(finite))
    if i in (0, len(lrs) - 1) or math.isinf(finite[i]):
        return None
    if math.isinf(finite[i - 1]) or math.isinf(finite[i + 1]):
        return lrs[i]
    before, after = lrs[i] - lrs[i - 1], lrs[i + 1] - lrs[i]
    fall, rise = (finite[i] - finite[i - 1]) / before, (finite[i + 1] - finite[i]) / after  # slopes on either side
    return lrs[i] - (fall * after + rise * before) / (2 * (rise - fall)) if rise > fall else lrs[i]


def drift(widths: Sequence[int], optima: Sequence[float | None]) -> float | None:
    """Powers of 2 by which the best learning rate grows where the width doubles: the slope of the least-squares line.
    None: an optimum is missing, or there is one width."""
    if len(widths) < 2 or any(found is None for found in optima):
        return None
    return float(np.polyfit(np.log2(widths), np.asarray(optima, float), 1)[0])


def drift_of(widths: Sequence[int], lrs: Sequence[float], losses: Losses) -> float | None:
    return drift(widths, [optimum(lrs, row) for row in losses.mean(-1)])


def drift_interval(widths: Sequence[int], lrs: Sequence[float], losses: Losses) -> tuple[float, float] | None:
    """95% interval of the drift over bootstrap samples of the seeds, the same for all widths and rates.

    Percentiles are those of Hesterberg's expanded interval (arXiv 1411.5279, section 5.3), which makes up for the
    narrowness of samples of few seeds; of three seeds it is the whole range of the bootstrap, and still optimistic.
    None: fewer than three seeds, or more than a twentieth of the samples have an optimum at an end.
    """
    seeds = losses.shape[-1]
    if seeds < LEAST_SEEDS:
        return None
    random = np.random.default_rng(0)
    drawn = [drift_of(widths, lrs, losses[..., random.integers(seeds, size=seeds)]) for _ in range(RESAMPLES)]
    found = [value for value in drawn if value is not None]
    if len(found) < 0.95 * RESAMPLES:
        return None
    tail = stats.norm.sf(math.sqrt(seeds / (seeds - 1)) * stats.t.isf(0.025, seeds - 1))
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def loss_at(lrs: Sequence[float], losses: Sequence[float], lr: float) -> float:
    """The loss between two learning rates, on the straight line; NaN outside, or beside one that diverged."""
    return float(np.interp(lr, lrs, losses, left=math.nan, right=math.nan))
