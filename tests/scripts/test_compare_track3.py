"""`compare.py --track3` on the published figures of record #36, and what may not be claimed."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIGURES = json.loads((ROOT / "tests/scripts/data/track3_36.json").read_text())


@pytest.fixture
def summary(tmp_path, monkeypatch, capsys):
    """What compare.py prints of runs: name -> (steps, losses), each planned for 3,250 updates."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    compare = importlib.import_module("compare")

    def of(runs, *words):
        for seed, (name, (steps, losses)) in enumerate(runs.items()):
            header = {"optim": "track3_muon", "model": "track3_124m", "data": "fineweb", "seed": seed, "steps": 3250}
            lines = [{"run": header | {"target": 3.28}}]
            for step, loss in zip(steps, losses, strict=True):
                lines.append({"step": step, "tokens": step * 524288, "train_time_s": 0.15 * step, "val/loss": loss})
            (tmp_path / name).mkdir()
            (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        assert compare.main([str(tmp_path), "--out", str(tmp_path / "out"), *words]) == 0
        return capsys.readouterr().out + (tmp_path / "out.md").read_text()

    return of


def published():
    return {name: (FIGURES["steps"], losses) for name, losses in FIGURES["losses"].items()}


def test_record_36_needs_3250_steps(summary):
    text = "Below 3.28 at step 3,250, evaluated by all seeds: mean 3.2787, n = 10, z = 3.26."
    found = summary(published(), "--track3")
    assert text in found and f"- shown: {text}" in found


def test_the_earliest_step_that_all_seeds_evaluate_counts(summary):
    """Seeds that are .001 better are there at step 3,225, unless one of them does not look then."""
    runs = {name: (steps, [loss - 0.001 for loss in losses]) for name, (steps, losses) in published().items()}
    assert "at step 3,225, evaluated by all seeds: mean 3.2783, n = 10" in summary(runs, "--track3")


def test_a_step_that_a_seed_does_not_evaluate_is_none(summary):
    runs = {name: (steps, [loss - 0.001 for loss in losses]) for name, (steps, losses) in published().items()}
    name, (steps, losses) = runs.popitem()
    runs[name] = ([*steps[:-2], 3250], [*losses[:-2], losses[-1]])
    assert "at step 3,250, evaluated by all seeds: mean 3.2777, n = 10" in summary(runs, "--track3")


def test_nothing_is_claimed_where_a_run_was_stopped(summary):
    runs = {name: (steps, [loss - 0.001 for loss in losses]) for name, (steps, losses) in published().items()}
    name, (steps, losses) = runs.popitem()
    found = summary({**runs, name: (steps[:-1], losses[:-1])}, "--track3")
    assert "not shown: Below 3.28 at one evaluated step of all seeds: no claim, runs set aside: 1." in found


def test_one_seed_needs_the_whole_margin(summary):
    runs = dict([published().popitem()])
    assert "Below 3.28 at one evaluated step of all seeds: there is none, n = 1." in summary(runs, "--track3")
