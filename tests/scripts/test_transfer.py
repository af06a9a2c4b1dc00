"""Transfer of learning rates: optima and drifts of known curves, the grid, and a study that stops and goes on."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from scripts.scaling import report
from scripts.scaling.grid import Cell, Results, cells
from scripts.scaling.optimum import drift, drift_interval, loss_at, optimum
from tests.errors import check_names

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["experiment=smoke", "logger=jsonl", "train.seq_len=16", "train.batch_tokens=32", "eval.tokens=32",
         "train.steps=2", "eval.every=2"]  # fmt: skip
LRS = [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0]


def test_the_optimum_is_the_vertex_of_a_parabola():
    assert optimum(LRS, [(x + 0.4) ** 2 for x in LRS]) == pytest.approx(-0.4)
    assert optimum(LRS, LRS) is None and optimum(LRS, [-x for x in LRS]) is None, "it lies outside"
    assert optimum(LRS, [3, 2, 1, math.nan, math.nan, math.nan]) == -1.0, "the next one diverged"
    assert optimum(LRS, [math.nan] * 6) is None
    assert loss_at(LRS, [x**2 for x in LRS], 0.5) == 0.5 and math.isnan(loss_at(LRS, LRS, 3.0))


def planted(slope, seeds, spread=0.02, study=0):
    """Losses [widths, lrs, seeds] whose best log2 rate is slope · log2(width / 64), each with a luck of its own."""
    best = np.array([[(x - slope * i) ** 2 / 10 for x in LRS] for i in range(3)])
    return [64, 128, 256], best[..., None] + np.random.default_rng(study).normal(0, spread, (3, 6, seeds))


def test_the_interval_of_a_planted_drift_holds_it():
    """With six seeds in at least 14 of 16 studies; it never holds 0."""
    found = []
    for study in range(16):
        widths, losses = planted(-0.8, 6, study=study)
        found.append(drift_interval(widths, LRS, losses))
    assert sum(low <= -0.8 <= high for low, high in found) >= 14 and not any(low <= 0 <= high for low, high in found)
    assert drift_interval(widths, LRS, planted(0.0, 2)[1]) is None, "two seeds say nothing of their spread"
    assert drift([64, 128, 256], [0.0, -1.0, -2.0]) == pytest.approx(-1) and drift([64], [0.0]) is None
    assert drift([64, 128], [0.0, None]) is None


def test_a_cell_is_what_train_py_is_told():
    axes = dict(optim=["adamw", "track3/muon"], param=["standard", "mup"], depths=[1], decay=[None, 0.1], lr=[0.5, 1.0],
                widths=[32, 64], seeds=[1, 2])  # fmt: skip
    found = cells(axes, 32)
    assert len(found) == 2 * 2 * 2 * 2 * (1 + 2), "the base width is run in one parametrisation"
    assert len({cell.name for cell in found}) == len(found) and not any("/" in cell.name for cell in found)
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)
    words = Cell("adamw", "mup", 2, 0.1, 64, 0.5, 7).overrides(32, 16)
    assert " ".join(sorted(words)) == (
        "model.base_width=32 model.n_embd=64 model.n_head=4 model.n_layer=2 model.param=mup optim.lr_scale=0.5 "
        "optim.matrix.weight_decay=0.1 optim=adamw seed=7"
    )


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    transfer = importlib.import_module("transfer")

    def start(*words: object) -> tuple[int, str, str]:
        status = transfer.main([str(word) for word in words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return start


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["widths=64,x"], ["widths=64,x", "whole numbers"]),
        (["widths=48"], ["head_dim=32", "widths=48"]),
        (["lr=0,1"], ["lr=0,1"]),
        (["lr=1,1"], ["lr=1,1", "different"]),
        (["seeds="], ["seeds="]),
        (["param=mu"], ["param=mu", "mup"]),
        (["optim=moun"], ["optim=moun", "muon"]),
        (["seed=3"], ["seed=3", "seeds"]),
        (["report=true"], ["no row", "same command", "widths"]),
    ],
)
def test_mistakes_give_one_line(run, tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    status, _, said = run("experiment=cpu_transfer", *words)
    assert status == 1 and not list(tmp_path.iterdir())
    check_names(said.strip(), "error: ", *named)


@pytest.mark.slow
def test_a_study_that_stops_goes_on(run, tmp_path, no_plot, monkeypatch):
    """A wild rate diverges and counts; what is there is not trained again; one seed more is only that seed."""
    grid = ["optim=adamw", "widths=16,32", "depths=1", "lr=0.5,1,1e30", "head_dim=16", *SMALL]
    grid.append(f"folder={tmp_path / 't'}")
    transfer = importlib.import_module("transfer")
    trained, train = [], transfer.Study.train

    def counted(self, config):
        if "measured" not in config.run.dir:
            if len(trained) == 5:
                trained.append("")
                raise KeyboardInterrupt
            trained.append(config.run.name)
        return train(self, config)

    monkeypatch.setattr(transfer.Study, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        run(*grid, "seeds=1")
    status, said, _ = run(*grid, "seeds=1")
    assert status == 0 and "projected: " in said and "4 of 9 runs" in said
    assert len(trained) == 10 and len(set(trained)) == 10
    assert run(*grid, "seeds=1,2")[1].startswith("9 of 18 runs")
    results = Results(tmp_path / "t")
    wild = results.read(Cell("adamw", "mup", 1, None, 32, 1e30, 2))
    assert math.isnan(wild["loss"]) and wild["lr"] == pytest.approx(0.0015e30)
    lines = (tmp_path / "t/transfer.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 12 and lines[0].startswith("optim,param,depth,decay,width,lr_factor,seed,loss")
    assert "| adamw, mup, 1 layer | 2 |" in (tmp_path / "t/transfer.md").read_text()
    assert (tmp_path / "t/transfer.png").stat().st_size > 10_000
    check_names(run(*grid, "seeds=1", "train.steps=4")[2].strip(), "error: ", "another study", "folder=")
    axes = json.loads((tmp_path / "t/transfer.json").read_text())
    assert axes["base_width"] == 16
    (tmp_path / "t/results" / f"{Cell('adamw', 'standard', 1, None, 16, 0.5, 1).name}.json").write_text("{")
    check_names(run(*grid, "seeds=1")[2].strip(), "error: ", "damaged", "delete")


def test_the_table_tells_drift_and_cost(tmp_path):
    widths, losses = planted(-1.0, 4, spread=0.001)
    row = report.Row("adamw", "standard", 2, None, widths, LRS, [1, 2, 3, 4], losses)
    text = report.to_markdown([row], ["experiment=x"])
    assert row.optima == pytest.approx([0, -1, -2], abs=0.05)
    assert "| adamw, standard, 2 layers | 4 | ×" in text and drift(widths, row.optima) == pytest.approx(-1, abs=0.05)
    assert row.cost == pytest.approx(0.4, abs=0.02), "two powers of 2 too far, on a parabola of 1/10"
    assert report.draw([row]).startswith(b"\x89PNG")
