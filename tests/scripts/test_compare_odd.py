"""Sweeps that are large or oddly named, and comparisons without a target."""

import importlib
import math
from pathlib import Path

import pytest

from scripts.speedrun import groups, page, picture, table
from tests.scripts.compare_runs import lines, write_run


def test_many_groups_with_long_labels_are_drawn(tmp_path):
    """The picture grows with its legend."""
    found = [write_run(tmp_path / str(n), lines(optim=f"a_name_of_{n}_" + "x" * 65)) for n in range(17)]
    comparison = groups.compare(found)
    rows = table.build(comparison)
    assert picture.draw("title", "setting", comparison, rows, []).startswith(b"\x89PNG")


def test_a_spreadsheet_computes_no_cell(tmp_path):
    found = [write_run(tmp_path / str(n), lines(optim=name)) for n, name in enumerate(("=cmd|x", "+1+1", "@x", "-2"))]
    comparison = groups.compare(found)
    text = table.to_csv(comparison, table.build(comparison))
    assert {line.split(",")[0] for line in text.splitlines()[1:]} == {"'=cmd|x", "'+1+1", "'@x", "'-2"}


def test_without_a_target_nothing_is_said_of_speed(tmp_path):
    found = [write_run(tmp_path / f"{name}", lines(optim=name, target=None)) for name in "ab"]
    comparison = groups.compare(found, baseline="a")
    lead = page._lead(comparison, table.build(comparison), [])
    assert "without a target" in lead and "speed-up" not in lead


@pytest.mark.parametrize("label", ["\ud800", "a\0b", "a\u202e\nb|c", "<b>", "", 5, ["x"], {"a": 1}])
def test_any_label_is_on_all_four_outputs(tmp_path, monkeypatch, label):
    for seed in (1, 2):
        write_run(tmp_path / str(seed), lines(optim=label, seed=seed, group=label or None))
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    compare = importlib.import_module("compare")
    monkeypatch.setattr(compare.picture, "draw", lambda *_: b"")  # has a test of its own
    assert compare.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert all((tmp_path / f"out.{kind}").exists() for kind in ("html", "csv", "md", "png"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"losses": (1e308, 1e308, 1e308, 1e308)}, "diverged"),
        ({"target": math.inf}, "target is inf"),
        ({"target": "3"}, "target is '3'"),
        ({"steps": True}, "steps is True"),
        ({"steps": 0}, "steps is 0"),
        ({"losses": (5.0,), "steps": 1}, "stopped early"),
    ],
)
def test_numbers_that_are_none_are_set_aside(tmp_path, record, reason):
    comparison = groups.compare([write_run(tmp_path / str(seed), lines(seed=seed, **record)) for seed in (1, 2)])
    assert table.build(comparison) == [] and reason in comparison.aside[0][1][0]


@pytest.mark.parametrize("change", [{"seconds_per_step": 0}, {"losses": (1, -1, -2, -3), "target": -2}, {}])
def test_runs_without_any_spread_are_compared(tmp_path, change):
    """Clocks that stand still, losses below zero, seeds that reach nothing."""
    found = [write_run(tmp_path / f"{o}{s}", lines(optim=o, seed=s, **change)) for o in "ab" for s in (1, 2, 3)]
    comparison = groups.compare(found, baseline="a")
    assert [row.final.n for row in table.build(comparison)] == [3, 3]
