"""A run that is interrupted and goes on, on the same ranks or others, is the run that was not interrupted."""

import os
import random

import pytest

from tests.distributed.jobs import TINY, Template, lines

pytestmark = pytest.mark.slow
SOAK = "NANOMUON_SOAK" in os.environ

LAYOUTS = [("single", 1), ("ddp", 2), ("ddp", 3), ("ddp", 4), ("fsdp", 2), ("fsdp", 3), ("fsdp", 4), ("hsdp", 4)]
# Every layout once as the source and once as the target.
ROUND = [("single", 1), ("fsdp", 2), ("ddp", 3), ("hsdp", 4), ("fsdp", 3), ("ddp", 2), ("fsdp", 4), ("ddp", 4)]
# Six rows on four ranks are 2, 2, 2 and none.
EXACT = [*TINY, "model.n_embd=6", "model.n_head=1", "train.dtype=float64", "eval.every=5", "optim.matrix.lr=0.003"]
OPTIMIZERS = ["muon", "adamw", "shampoo", "soap"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    with Template(tmp_path_factory.mktemp("jobs")) as started:
        yield started


def settings(optim: str) -> list[str]:
    if optim == "whitened":
        return ["optim=muon", "optim.matrix._target_=tests.distributed.rules.Whitened"]
    often = ["optim.matrix.every=2"] if optim in ("shampoo", "soap") else []  # state that changes between saves
    return [f"optim={optim}", *often]


def numbers(directory, keys=("train/loss", "val/loss", "grad_norm")) -> list[tuple]:
    return [(line["step"], *(line.get(key) for key in keys)) for line in lines(directory)]


def assert_same(found, expected, tolerance: float) -> None:
    assert [row[0] for row in found] == [row[0] for row in expected], "each step is in the record once"
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine[1:], theirs[1:], strict=True):
            assert (a is None) == (b is None), (mine, theirs)
            assert a is None or abs(a - b) <= tolerance * abs(b), (mine, theirs)


@pytest.mark.parametrize("optim", OPTIMIZERS if SOAK else ["muon", "shampoo", "soap"])
def test_every_sharding_goes_on_from_every_other(template, tmp_path, optim):
    steps = 2 * len(ROUND) + 2
    common = [*EXACT, *settings(optim), f"train.steps={steps}"]
    template.run([*common, "parallel=single", f"run.dir={tmp_path}/whole"])
    for number, (mode, ranks) in enumerate([*ROUND, ROUND[0]]):
        stop = None if number == len(ROUND) else ["send", {"step": 2 * number + 1, "to": number % ranks}]
        job = template.run([*common, f"parallel={mode}", f"run.dir={tmp_path}/parts"], ranks, stop)
        if number:
            before = ROUND[number - 1]
            assert f"{before[1]} ranks ({before[0]}) -> {ranks} ({mode})" in job.output()
            assert f"going on after update {2 * number} of {steps}" in job.output()
    assert_same(numbers(tmp_path / "parts"), numbers(tmp_path / "whole"), 1e-9)


@pytest.mark.skipif(not SOAK, reason="the whole matrix: NANOMUON_SOAK=1")
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_whole_matrix_of_shardings(template, tmp_path, optim):
    common = [*EXACT, *settings(optim), "train.steps=8"]
    template.run([*common, "parallel=single", f"run.dir={tmp_path}/whole"])
    expected = numbers(tmp_path / "whole")
    for source, ranks in LAYOUTS:
        saved = f"{tmp_path}/{source}{ranks}"
        template.run([*common, f"parallel={source}", f"run.dir={saved}"], ranks, ["send", {"step": 3, "to": 0}])
        for target, others in LAYOUTS:
            mine = f"{saved}-{target}{others}"
            template.run([*common, f"parallel={target}", f"run.dir={mine}", f"run.from={saved}"], others)
            assert_same(numbers(mine), expected, 1e-9)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_killed_again_and_again(template, tmp_path, optim):
    """SIGKILL to one rank or to all, at any moment, saving included; each time the record has each step once."""
    ranks, kills = 2, 30 if SOAK else 2
    common = [*TINY, *settings(optim), "parallel=fsdp", "train.steps=60", "eval.every=10", "logger.every=1"]
    template.run([*common, f"run.dir={tmp_path}/whole"], ranks)
    dice = random.Random(optim)
    often = [*common, f"run.dir={tmp_path}/parts", "checkpoint.every=2"]
    slow = ["slow_saves", {"seconds": 0.05}]
    for _ in range(kills):
        job = template.start(often, ranks, slow)
        _let_it_run(job, tmp_path / "parts", dice)
        victims = dice.choice([[0], [1], [0, 1]])
        for rank in victims:
            job.kill(rank)
        job.kill_all()  # what the launcher does to the rest
    job = template.run(often, ranks, slow)
    assert "is not used" not in job.output(), "a killed save never leaves a damaged checkpoint"
    assert_same(numbers(tmp_path / "parts"), numbers(tmp_path / "whole"), 0.0)
    assert not list((tmp_path / "parts" / "checkpoints").glob("*.partial"))


def _let_it_run(job, directory, dice) -> None:
    """Until it has done a few more updates, or for a moment of its start."""
    import time

    record = directory / "metrics.jsonl"
    start = time.monotonic()
    before = record.stat().st_size if record.exists() else 0
    more = dice.choice([0, 300, 900, 1800])
    while time.monotonic() < start + 20 and None in job.poll():
        if (record.stat().st_size if record.exists() else 0) >= before + more and time.monotonic() > start + 0.3:
            break
        time.sleep(0.005)
    time.sleep(dice.random() * 0.1)
