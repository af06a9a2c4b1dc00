"""A preset that names a record of track 3 is that record: the losses of its own code, step by step.

Each tests/trainer/data/track3_*.json says which problem, source and settings its figures belong to.
"""

import json
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"
# The problem of the figures, as its file describes it.
PROBLEM = [
    "experiment=track3", "data=sample", "data.order=sequential", "logger=jsonl", "logger.every=1",
    "train.dtype=float64", "model.n_layer=2", "model.n_embd=64", "model.n_head=2", "model.init=fan_in",
    "train.steps=40", "train.batch_tokens=2048", "train.seq_len=128", "train.micro_batch=8",
    "eval.tokens=8192", "eval.every=10", "eval.late_every=null", "schedule.horizon=null",
]  # fmt: skip
ROLES = ("embedding", "head", "scalar", "matrix")  # in the order of the figures


def losses(configure, folder, *overrides):
    """The lines of the record of a run on PROBLEM."""
    from trainer.loop import Trainer

    Trainer(configure(*PROBLEM, f"run.dir={folder}", *overrides)).run()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [pytest.param("adam", marks=pytest.mark.slow), "muon"])
def test_losses_are_those_of_the_records_own_code(configure, tmp_path, no_plot, name):
    golden = json.loads((DATA / f"track3_{name}.json").read_text())
    lines = losses(configure, tmp_path / "run", f"optim=track3/{name}")
    assert [line["train/loss"] for line in lines[1:]] == pytest.approx(golden["train"], rel=1e-9)
    found = {line["step"]: line["val/loss"] for line in lines if "val/loss" in line}
    assert found == pytest.approx(dict(golden["val"]), rel=1e-9)
    for line, rates in ((lines[1], golden["lr_first"]), (lines[-1], golden["lr_last"])):
        assert [line[f"lr/{role}"] for role in ROLES] == pytest.approx(rates, rel=1e-12)
