"""Paired comparisons: the formulas, what is claimed, and whole simulated studies of which the truth is known."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from scripts.speedrun import groups, paired, table
from scripts.speedrun.claims import claims
from scripts.speedrun.records import LOSS, Run
from tests.scripts.compare_runs import HEADER, lines, write_run, write_runs

MINE, THEIRS = [2.90, 2.95, 2.99, 2.91], [2.93, 2.97, 3.04, 2.95]


def compared(runs, **options):
    """The row of the one group that is not the baseline, and what is said of its pairs."""
    comparison = groups.compare(runs, baseline="a")
    rows = table.build(comparison, **options)
    (row,) = [row for row in rows if row.label != "a"]
    said = claims(comparison, rows, **options)
    return row, [claim for claim in said if "same seeds" in claim.text]


def test_the_difference_is_scipys_paired_one(tmp_path):
    row, _ = compared([*write_runs(tmp_path, "a", THEIRS), *write_runs(tmp_path, "b", MINE)])
    expected = stats.ttest_rel(MINE, THEIRS)
    assert row.pairs.loss.p == row.p_pairs_holm == pytest.approx(expected.pvalue, rel=1e-9)
    interval = expected.confidence_interval(0.95)
    assert (row.pairs.loss.low, row.pairs.loss.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    welch = stats.ttest_ind(MINE, THEIRS, equal_var=False).confidence_interval(0.95)
    assert row.pairs.welch == pytest.approx((welch.low, welch.high), rel=1e-9)
    assert row.pairs.n == 4 and row.pairs.loss.high - row.pairs.loss.low < welch.high - welch.low


def test_only_common_seeds_are_pairs(tmp_path):
    odd = [write_run(tmp_path / f"odd{s}", lines((5, 4, 3.2, 9), optim="b", seed=s)) for s in (7, 8)]
    row, _ = compared([*write_runs(tmp_path, "a", THEIRS), *write_runs(tmp_path, "b", MINE), *odd])
    assert row.pairs.n == 4 and row.final.n == 6
    (tmp_path / "one").mkdir()
    row, said = compared([*write_runs(tmp_path / "one", "a", THEIRS), *odd])
    assert row.pairs is None and not said


def test_the_same_run_twice_is_no_difference(tmp_path):
    row, (said,) = compared([*write_runs(tmp_path, "a", THEIRS), *write_runs(tmp_path, "b", THEIRS)])
    assert row.pairs.loss == paired.Difference(0.0) and row.pairs.steps == paired.Difference(0.0)
    assert not said.shown and "no spread, no test" in said.text


def test_steps_by_hand(tmp_path):
    """The better run is at 4.0 after 100 steps and at 3.2 after 200: at 3.6 after 150, 150 before its end."""
    fast, slow = (write_run(tmp_path / name, lines((5, 4, 3.2, final))) for name, final in (("x", 2.8), ("y", 3.6)))
    assert paired.steps_gained(fast, slow) == pytest.approx(150)
    assert paired.steps_gained(slow, fast) == pytest.approx(-150)
    runs = [*write_runs(tmp_path, "a", THEIRS), *write_runs(tmp_path, "b", MINE)]
    row, _ = compared(runs, loss_per_step=1e-4, sigma=1)
    assert row.pairs.steps.mean == pytest.approx(350)
    assert row.pairs.steps.low == pytest.approx(-1e4 * row.pairs.loss.high)


def test_power_is_what_simulation_says():
    random, limit = np.random.default_rng(0), 0.01
    gaps = random.normal(1.1, 1, (4000, 8))
    found = np.mean(stats.ttest_1samp(gaps, 0, axis=1).pvalue < limit)
    assert paired.power(8, 1.1, limit) == pytest.approx(found, abs=0.025)
    assert paired.power(8, 0.0, limit) == pytest.approx(limit, rel=1e-6)
    enough = paired.seeds_needed(0.02, 0.01, pilot=5)
    sure = 0.01 * math.sqrt(4 / stats.chi2.ppf(0.2, 4))
    assert paired.power(enough, 0.02 / sure, limit) >= 0.8 > paired.power(enough - 1, 0.02 / sure, limit)
    assert paired.seeds_needed(1e-9, 1.0, pilot=5) is None


def test_what_a_gain_is_worth_is_read_off_the_baselines_curve(tmp_path):
    group = groups.Group("a", write_runs(tmp_path, "a", [3.0, 2.8]))
    assert paired.worth_in_loss(group, 0.2) == pytest.approx(0.6 * (3.2 - 2.9))  # from step 240: 60 of 100 steps
    assert paired.worth_in_loss(groups.Group("a", write_runs(tmp_path, "b", [3.3])), 0.2) is None


class Studies:
    """Simulated optimizers: loss = 2 + 12 t^-0.4, a seed's luck that both sides share, and each run's own."""

    def __init__(self, gain: float, number: int):
        self.gain, self.random = gain, np.random.default_rng([int(1000 * gain), number])
        self.runs: list[Run] = []

    def add(self, seeds: range) -> None:
        for seed in seeds:
            luck = self.random.normal(0, 0.02)
            self.runs += [self._run("a", seed, luck, 1.0), self._run("b", seed, luck, 1 - self.gain)]

    def _run(self, optim: str, seed: int, luck: float, time: float) -> Run:
        header = HEADER | {"optim": optim, "seed": seed, "steps": 1000, "target": None}
        run = Run(Path("x"), "x", header, last_step=1000)
        own = self.random.normal(0, 0.006)
        for step in range(50, 1001, 50):
            wobble = self.random.normal(0, 0.001)
            run.curves[LOSS].append(step, step, step, 2 + 12 * (step / time) ** -0.4 + luck + own + wobble)
        return run

    def claimed(self) -> bool:
        """With five seeds; where that does not decide it, again with the seeds that the power line asks for."""
        self.add(range(5))
        row, (said,) = compared(self.runs)
        if not said.shown:
            assert f"takes {row.pairs.seeds} seeds" in said.text and "5%" in said.text
            self.add(range(5, row.pairs.seeds))
            row, (said,) = compared(self.runs)
        self.right = (row.pairs.loss.mean < 0) == (row.pairs.steps.mean > 0) and row.pairs.loss.mean < 0
        return said.shown


@pytest.mark.slow
def test_of_the_same_optimizer_no_difference_is_claimed():
    claimed = sum(Studies(0.0, i).claimed() for i in range(100))
    print(f"of the same optimizer: {claimed} of 100 studies claim a difference")
    assert claimed <= 6


@pytest.mark.slow
def test_a_planted_gain_is_found_with_the_seeds_that_the_power_line_asks_for():
    studies = [Studies(0.05, i) for i in range(100)]
    found = [study for study in studies if study.claimed()]
    print(f"a planted gain of 5%: {len(found)} of 100 studies find it")
    assert len(found) >= 80 and all(study.right for study in found)
    assert sum(len(study.runs) > 10 for study in studies) > 20, "five seeds alone did not do it"
