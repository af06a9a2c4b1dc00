"""A run that is interrupted and goes on, on the same ranks or others, is the run that was not interrupted."""

import json
import os
import random
import time

import pytest

from tests.distributed.jobs import TINY, Template, lines

pytestmark = pytest.mark.slow
SOAK = "NANOMUON_SOAK" in os.environ

LAYOUTS = [("single", 1), ("ddp", 2), ("ddp", 3), ("ddp", 4), ("fsdp", 2), ("fsdp", 3), ("fsdp", 4), ("hsdp", 4)]
# Every layout once as the source and once as the target.
ROUND = [("single", 1), ("fsdp", 2), ("ddp", 3), ("hsdp", 4), ("fsdp", 3), ("ddp", 2), ("fsdp", 4), ("ddp", 4)]
# Six rows on four ranks are 2, 2, 2 and none.
EXACT = [*TINY, "model.n_embd=6", "model.n_head=1", "train.dtype=float64", "eval.every=5", "optim.matrix.lr=0.003"]
# Roots and bases every other step, so that they change between saves.  In the exact runs they are taken of
# well-conditioned factors only: the bases of a 24 x 6 gradient's longer side are not determined, on any ranks.
OFTEN = {"shampoo": ["optim.matrix.every=2"], "soap": ["optim.matrix.every=2"]}
CONDITIONED = {"shampoo": ["optim.matrix.eps=1e-4"], "soap": ["optim.matrix.max_dim=10", "optim.matrix.eps=1e-4"]}
OPTIMIZERS = ["muon", "adamw", "shampoo", "soap"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    with Template(tmp_path_factory.mktemp("jobs")) as started:
        yield started


def exact(optim: str, steps: int) -> list[str]:
    return [*EXACT, f"optim={optim}", *OFTEN.get(optim, []), *CONDITIONED.get(optim, []), f"train.steps={steps}"]


def numbers(directory) -> list[tuple]:
    found = lines(directory)
    times = [line["train_time_s"] for line in found]
    assert times == sorted(times), "the clock goes on where it stood"
    return [(line["step"], line.get("train/loss"), line.get("val/loss"), line.get("grad_norm")) for line in found]


def assert_same(found, expected, tolerance: float) -> None:
    assert [row[0] for row in found] == [row[0] for row in expected], "each step is in the record once"
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine[1:], theirs[1:], strict=True):
            assert (a is None) == (b is None), (mine, theirs)
            assert a is None or abs(a - b) <= tolerance * abs(b), (mine, theirs)


@pytest.mark.parametrize("optim", OPTIMIZERS if SOAK else ["muon", "shampoo"])
def test_every_sharding_goes_on_from_every_other(template, tmp_path, optim):
    steps = 2 * len(ROUND) + 2
    common = exact(optim, steps)
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
    common = exact(optim, 8)
    template.run([*common, "parallel=single", f"run.dir={tmp_path}/whole"])
    expected = numbers(tmp_path / "whole")
    for source, ranks in LAYOUTS:
        saved = f"{tmp_path}/{source}{ranks}"
        template.run([*common, f"parallel={source}", f"run.dir={saved}"], ranks, ["send", {"step": 3, "to": 0}])
        for target, others in LAYOUTS:
            mine = f"{saved}-{target}{others}"
            template.run([*common, f"parallel={target}", f"run.dir={mine}", f"run.from={saved}"], others)
            assert_same(numbers(mine), expected, 1e-9)


@pytest.mark.parametrize("optim", OPTIMIZERS if SOAK else ["muon", "soap"])
def test_killed_again_and_again(template, tmp_path, optim):
    """SIGKILL to one rank or to all, at any moment, saving included; each time the record has each step once."""
    ranks, kills = 2, 30 if SOAK else 3
    common = [*TINY, f"optim={optim}", *OFTEN.get(optim, []), "parallel=fsdp", "train.steps=60", "eval.every=10"]
    template.run([*common, f"run.dir={tmp_path}/whole"], ranks)
    dice = random.Random(optim)
    often = [*common, f"run.dir={tmp_path}/parts", "checkpoint.every=2"]
    slow = ["slow_saves", {"seconds": 0.05}]
    outputs = []
    for _ in range(kills):
        job = template.start(often, ranks, slow)
        _let_it_run(job, tmp_path / "parts", dice)
        victims = dice.choice([[0], [1], [0, 1]])
        for rank in victims:
            job.kill(rank)
        job.kill_all()  # what the launcher does to the rest
        outputs.append(job.output())
    outputs.append(template.run(often, ranks, slow).output())
    assert sum("going on after update" in output for output in outputs) >= kills // 3
    assert not any("is not used" in output for output in outputs), "a killed save never leaves a damaged checkpoint"
    assert_same(numbers(tmp_path / "parts"), numbers(tmp_path / "whole"), 0.0)
    assert not list((tmp_path / "parts" / "checkpoints").glob("*.partial"))


def test_a_finished_run_is_left_alone(template, tmp_path):
    """And W&B goes on with the same run, whoever starts it again."""
    common = [*TINY, "train.steps=6", "logger=wandb", f"run.dir={tmp_path}/run"]
    template.run(common, 1, ["send", {"step": 3, "to": 0}])
    template.run(common)
    offline = [path.name.rpartition("-")[2] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert offline == [json.loads((tmp_path / "run" / "run.json").read_text())["id"]] * 2
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")}
    job = template.run(common)
    assert job.output().startswith(f"{tmp_path}/run is finished: step 6") and len(job.output().splitlines()) == 1
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")}


def _let_it_run(job, directory, dice) -> None:
    """Until it has done a few more updates, or for a moment of its start."""
    record = directory / "metrics.jsonl"
    start = time.monotonic()
    before = record.stat().st_size if record.exists() else 0
    more = 270 * dice.choice([0, 0, 1, 2] if SOAK else [0, 4, 8, 12])  # bytes of a line
    while time.monotonic() < start + 20 and None in job.poll():
        if (record.stat().st_size if record.exists() else 0) >= before + more and time.monotonic() > start + 0.3:
            break
        time.sleep(0.005)
    time.sleep(dice.random() * 0.1)
