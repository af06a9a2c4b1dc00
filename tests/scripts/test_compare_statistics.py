"""The statistics against scipy, hand-made numbers and the speedrun's own worked examples."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scripts.speedrun import statistics
from trainer.metrics.summary import Crossing, crossing

A = [3.2768, 3.2791, 3.2775, 3.2783]
B = [3.2846, 3.2859, 3.2872]
costs = st.lists(st.floats(10, 1e6), min_size=2, max_size=6)
quick = settings(deadline=None, max_examples=40)


def test_estimate_is_mean_and_standard_error():
    found = statistics.estimate(A)
    assert found.mean == pytest.approx(np.mean(A), rel=1e-14)
    assert found.error == pytest.approx(np.std(A, ddof=1) / 2, rel=1e-12)
    assert statistics.estimate([2.5]) == statistics.Estimate(2.5, None, 1)
    assert statistics.estimate([]) is None


def test_one_sample_test_is_scipys():
    expected = stats.ttest_1samp(A, 3.28, alternative="less")
    assert statistics.below_target(A, 3.28) == expected.pvalue
    t = (np.mean(A) - 3.28) / (np.std(A, ddof=1) / 2)
    assert statistics.below_target(A, 3.28) == pytest.approx(stats.t.cdf(t, 3), rel=1e-9)


def test_welch_is_scipys():
    assert statistics.differ(A, B) == stats.ttest_ind(A, B, equal_var=False).pvalue
    va, vb = np.var(A, ddof=1) / 4, np.var(B, ddof=1) / 3
    freedom = (va + vb) ** 2 / (va**2 / 3 + vb**2 / 2)
    t = (np.mean(A) - np.mean(B)) / math.sqrt(va + vb)
    assert statistics.differ(A, B) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-9)


@pytest.mark.parametrize(("a", "b"), [([3.2], B), (A, [3.2]), ([3.2, 3.2], [3.3, 3.3])])
def test_no_test_without_spread(a, b):
    assert statistics.differ(a, b) is None
    assert statistics.speedup(a, b).low is None


@pytest.mark.parametrize("losses", [[3.2], [3.2, 3.2, 3.2]])
def test_no_one_sample_test_without_spread(losses):
    assert statistics.below_target(losses, 3.28) is None


def test_speedup_interval_is_welchs_on_logarithms():
    slow, fast = [4000.0, 4100.0, 4050.0], [3000.0, 3100.0, 3020.0, 3050.0]
    found = statistics.speedup(slow, fast)
    a, b = np.log(slow), np.log(fast)
    va, vb = a.var(ddof=1) / 3, b.var(ddof=1) / 4
    freedom = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 3)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(va + vb)
    assert found.value == pytest.approx(stats.gmean(slow) / stats.gmean(fast), rel=1e-12)
    assert found.low == pytest.approx(math.exp(a.mean() - b.mean() - half), rel=1e-9)
    assert found.high == pytest.approx(math.exp(a.mean() - b.mean() + half), rel=1e-9)


@quick
@given(costs, costs, st.floats(0.01, 100))
def test_speedup_laws(a, b, unit):
    """Exchanging the sides inverts it; the unit of cost does not matter."""
    found, swapped = statistics.speedup(a, b), statistics.speedup(b, a)
    scaled = statistics.speedup([unit * x for x in a], [unit * x for x in b])
    assert found.value * swapped.value == pytest.approx(1, rel=1e-9)
    assert found.value == pytest.approx(scaled.value, rel=1e-9)
    if found.low is not None and swapped.low is not None:
        assert found.low <= found.value * (1 + 1e-9) and found.value <= found.high * (1 + 1e-9)
        assert found.low * swapped.high == pytest.approx(1, rel=1e-6)


def test_interval_covers_the_truth_as_often_as_it_says():
    """1000 comparisons of 3 against 3 log-normal seeds with a true speed-up of 1.3; 95% ± 2% (3 standard errors)."""
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        slow, fast = np.exp(random.normal(math.log(1.3), 0.02, 3)), np.exp(random.normal(0, 0.02, 3))
        found = statistics.speedup(list(slow), list(fast))
        hits += found.low <= 1.3 <= found.high
    assert 930 <= hits <= 985  # Welch's approximation is a little wide for three seeds


def test_a_start_at_the_target_has_no_ratio():
    assert statistics.speedup([0.0, 1.0], [1.0, 2.0]) is None


@pytest.mark.parametrize(
    ("baseline_mean", "mean", "saved", "n", "baseline_n", "published"),
    [(0.0, 0.0, 15, 16, 10, 0.00167), (3.2778, 3.2785, 40, 16, 10, 0.0027), (3.2788, 3.2790, 50, 20, 20, 0.00648)],
)
def test_pairwise_rule_gives_track_3s_own_examples(baseline_mean, mean, saved, n, baseline_n, published):
    """The three calculations in track 3's README (results 13 against 11 and 8, and 12 against 6)."""
    z = statistics.z_better([mean] * n, [baseline_mean] * baseline_n, 0.0013, saved, 0.0045 / 100)
    assert z * 0.0013 == pytest.approx(published, abs=6e-5)
    assert (z >= statistics.Z_LIMIT) == (published >= 0.004)


def test_known_sigma_rule_is_track_3s():
    """A single run needs 3.276, four need 3.278 on average."""
    for losses in ([3.2759], [3.2779] * 4):
        assert statistics.z_below_target(losses, 3.28, 0.0013) >= statistics.Z_LIMIT
    for losses in ([3.2761], [3.2781] * 4):
        assert statistics.z_below_target(losses, 3.28, 0.0013) < statistics.Z_LIMIT
    assert statistics.z_pvalue(statistics.Z_LIMIT) == pytest.approx(0.001, rel=0.1)


def test_holm_by_hand():
    assert statistics.holm([0.01, None, 0.04, 0.03]) == [
        pytest.approx(0.03),
        None,
        pytest.approx(0.06),
        pytest.approx(0.06),
    ]
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_crossing_by_hand():
    losses, seconds = [4.0, 3.5, 3.3, 3.2], [0.0, 10.0, 20.0, 32.0]
    assert crossing(seconds, losses, 3.25) == Crossing(pytest.approx(26.0), 32.0)
    assert crossing(seconds, losses, 3.5) == Crossing(10.0, 10.0)
    assert crossing(seconds, losses, 4.5) == Crossing(0.0, 0.0)
    assert crossing(seconds, losses, 3.1) is None


def test_crossing_is_the_first_one():
    assert crossing([0, 1, 2, 3], [4.0, 3.0, 3.5, 2.0], 3.2).first == 1


@quick
@given(st.lists(st.floats(1, 10), min_size=2, max_size=20), st.floats(1, 10))
def test_crossing_lies_between_its_evaluations(losses, target):
    steps = [100 * i for i in range(len(losses))]
    found = crossing(steps, losses, target)
    reached = [step for step, loss in zip(steps, losses, strict=True) if loss <= target]
    assert (found is None) == (not reached)
    if found is not None:
        assert found.first == reached[0]
        assert max(0, found.first - 100) <= found.interpolated <= found.first
