"""Sweeps as users start them: the same jobs, in the same folder, with the same results on any number of processes."""

import json
import math
import os
import re
import shutil

import pytest

from tests import runs
from tests.distributed import programs
from tests.errors import check_names, error_lines
from tests.runs import TINY, cut_record, read_record

pytestmark = pytest.mark.slow
# The first learning rate ends a run at its second update.
SWEEP = [*TINY, "train.steps=4", "eval.every=2", "-m", "optim.matrix.lr=1e30,0.01"]
SEEDS = ["seed=1,2", "sweep.order=abba"]
RANKS = [2, 0, 1, 3] if "NANOMUON_SOAK" in os.environ else [2]  # 0: processes of their own
BAD, GOOD = "optim.matrix.lr=1e+30,seed=", "optim.matrix.lr=0.01,seed="


def sweep(*arguments, ranks, cwd, code, train=programs.train):
    done = train(*SWEEP, *arguments, ranks=ranks, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def order(done):
    return [line.split(": ")[1] for line in done.stdout.splitlines() if re.match(r"job \d+ of \d+: ", line)]


def losses(directory):
    """NaN, which JSON does not have, is null in a record."""
    found = [line["train/loss"] for line in read_record(directory) if "train/loss" in line]
    return [math.nan if loss is None else loss for loss in found]


def test_sweeps(tmp_path):
    own = sweep("seed=1", "hydra.sweep.dir=own", ranks=0, cwd=tmp_path, code=1)
    assert order(own) == [f"{BAD}1", f"{GOOD}1"], "in order, and the second after the first has failed"
    [error] = error_lines(own.stderr)
    check_names(error, "step 2", "loss", "train.non_finite=skip")
    assert len(losses(tmp_path / "own" / f"{GOOD}1")) == 4
    assert "python scripts/compare.py own --out own/speedrun" in own.stdout

    names = [f"{BAD}1", f"{BAD}2", f"{GOOD}1", f"{GOOD}2"]
    for ranks in RANKS:
        folder = tmp_path / f"together{ranks}"
        done = sweep(*SEEDS, f"hydra.sweep.dir={folder.name}", ranks=ranks, cwd=tmp_path, code=1, train=runs.train)
        assert order(done) == [names[i] for i in (0, 2, 3, 1)], "the second seed's jobs backwards"
        assert len(error_lines(done.stderr)) == 2, "what all ranks meet is told once"
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(names)
        for name in names:
            ran = json.loads((folder / name / "run.json").read_text())["identity"]
            assert f"optim.matrix.lr={ran['optim.matrix.lr']},seed={ran['seed']}" == name
        for name in (f"{BAD}1", f"{GOOD}1"):
            expected = losses(tmp_path / "own" / name)[:2]
            assert losses(folder / name)[:2] == pytest.approx(expected, rel=1e-4, nan_ok=True)
        assert losses(folder / names[2]) != losses(folder / names[3])
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == sorted(["own", *(f"together{ranks}" for ranks in RANKS)]), "no stray folders"

    folder = tmp_path / "together2"
    before, trained = (folder / names[2] / "metrics.jsonl").read_text(), losses(folder / names[3])
    cut_record(folder / names[3], lines=3, torn=9)  # as if it had been killed
    shutil.rmtree(folder / names[3] / "checkpoints")
    torn = (folder / names[3] / "metrics.jsonl").read_bytes()
    stopped = sweep(*SEEDS, "hydra.sweep.dir=together2", ranks=1, cwd=tmp_path, code=1)
    assert (folder / names[3] / "metrics.jsonl").read_bytes() == torn, "no record is emptied without a word"
    assert "run.resume=restart" in stopped.stdout
    again = sweep(*SEEDS, "hydra.sweep.dir=together2", "run.resume=restart", ranks=1, cwd=tmp_path, code=1)
    rows = [line.split() for line in again.stdout.splitlines() if line.startswith("optim")]
    states = {row[0]: row[1:-4] for row in rows}
    assert states == dict(zip(names, [["failed"], ["failed"], ["finished", "before"], ["finished"]], strict=True))
    assert (folder / names[2] / "metrics.jsonl").read_text() == before, "what is finished is not touched"
    assert [line["step"] for line in read_record(folder / names[3])] == [0, 1, 2, 3, 4], "each step once"
    assert losses(folder / names[3]) == pytest.approx(trained, rel=1e-4)

    ids = [json.loads(path.read_text())["id"] for path in tmp_path.glob("*/*/run.json")]
    assert len(ids) == 2 + 4 * len(RANKS) and len(set(ids)) == len(ids), "no two runs are one to W&B"
