"""Our own CPU track in the speedrun's figure: from records to the small file, and with and without that file."""

import json

import pytest

from scripts.lecture import style
from scripts.lecture.experiment import load
from scripts.lecture.speedrun import curves
from scripts.speedrun.records import RecordError

HEADER = {"model": "small", "data": "text", "batch_tokens": 64, "seq_len": 8, "eval_tokens": 64, "steps": 20}


def record(folder, optim, seed, losses, **changes):
    run = folder / f"{optim}-{seed}-{changes}"
    run.mkdir(parents=True)
    lines = [{"run": HEADER | {"optim": optim, "seed": seed} | changes}] + [
        {"step": 10 * i, "tokens": 640 * i, "train_time_s": (1.0 + seed) * i, "val/loss": loss}
        for i, loss in enumerate(losses)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def file(tmp_path):
    for seed in (0, 1):
        record(tmp_path / "runs", "adamw", seed, (5.0, 4.0 + seed, 3.0))
        record(tmp_path / "runs", "muon", seed, (5.0, 3.0, 2.0 + seed))
    record(tmp_path / "runs", "muon", 2, (5.0, 3.0, 1.0), model="another")
    assert curves.write_curves(tmp_path / "runs", tmp_path / "curves.csv") == 1
    return tmp_path / "curves.csv"


def test_curves_are_means_over_the_seeds_of_comparable_runs(file):
    muon, adamw = curves.read_curves(file)
    assert muon == curves.Curve("muon", 2, [0, 10, 20], [0.0, 1.5, 3.0], [5.0, 3.0, 2.5])
    assert adamw == curves.Curve("adamw", 2, [0, 10, 20], [0.0, 1.5, 3.0], [5.0, 4.5, 3.0])


def test_no_runs_are_an_error_and_write_nothing(tmp_path):
    with pytest.raises(RecordError):
        curves.write_curves(tmp_path, tmp_path / "curves.csv")
    assert not (tmp_path / "curves.csv").exists()


def test_the_figure_says_what_is_missing(file, tmp_path, monkeypatch):
    speedrun, shown = load("speedrun"), []
    monkeypatch.setattr(speedrun, "note", lambda axes, text, *place, **how: shown.append(text))
    for own in (curves.read_curves(tmp_path / "none.csv"), curves.read_curves(file)):
        measured = speedrun.measure(short=True) | {"own": own}
        assert style.picture(speedrun, measured).startswith(b"\x89PNG")
        shown.append(f"{len(own)} curves")
        rows = [check for check in speedrun.check(measured) if check.what.startswith("our CPU track")]
        assert [check.value for check in rows] == [curve.losses[-1] for curve in own]
        assert all(check.holds and check.required == "–" for check in rows)
    missing = [any("is missing" in text for text in part) for part in (shown[: shown.index("0 curves")], shown[-2:])]
    assert missing == [True, False]
