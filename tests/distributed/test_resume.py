"""A run that is interrupted and goes on, on the same ranks or others, is the run that was not interrupted.

``NANOMUON_SOAK=1`` goes from every sharding to every other; ``-s`` shows how exactly.
"""

import json
import os

import pytest

from tests.distributed.forks import Ranks
from tests.distributed.jobs import Template
from tests.runs import TINY, read_losses, read_record

pytestmark = pytest.mark.slow
SOAK = "NANOMUON_SOAK" in os.environ

LAYOUTS = [("single", 1), *((mode, ranks) for mode in ("ddp", "fsdp") for ranks in (1, 2, 3, 4)), ("hsdp", 4)]
# Every layout once as the source and once as the target.
ROUND = [("single", 1), ("fsdp", 2), ("ddp", 3), ("hsdp", 4), ("fsdp", 1), ("fsdp", 3), ("ddp", 2), ("fsdp", 4),
         ("ddp", 1), ("ddp", 4)]  # fmt: skip
# Six rows on four ranks are 2, 2, 2 and none.
EXACT = [*TINY, "model.n_embd=6", "model.n_head=1", "train.dtype=float64", "eval.every=5", "optim.matrix.lr=0.003"]
# Roots and bases every other step, so that they change between saves.  In the exact runs they are taken of
# well-conditioned factors only: the bases of a 24 x 6 gradient's longer side are not determined, on any ranks.
OFTEN = {"shampoo": ["optim.matrix.update_freq=2"], "soap": ["optim.matrix.update_freq=2"]}
CONDITIONED = {"shampoo": ["optim.matrix.eps=1e-4"], "soap": ["optim.matrix.max_dim=10", "optim.matrix.eps=1e-4"]}
OPTIMIZERS = ["muon", "adamw", "shampoo", "soap", "mars", "schedule_free"]


def run(template: Template, arguments: list[str], layout: tuple[str, int], hook: list | None = None) -> Ranks:
    """Under a launcher, as ddp and fsdp want it for one process too; or without, for single."""
    mode, ranks = layout
    return template.run([*arguments, f"parallel={mode}"], ranks, hook, launched=mode != "single")


def exact(optim: str, steps: int) -> list[str]:
    return [*EXACT, f"optim={optim}", *OFTEN.get(optim, []), *CONDITIONED.get(optim, []), f"train.steps={steps}"]


def losses(directory) -> list[tuple]:
    times = [line["train_time_s"] for line in read_record(directory)]
    assert times == sorted(times), "the clock goes on where it stood"
    return read_losses(directory)


def assert_same(found, expected, tolerance: float) -> float:
    """Returns the largest relative difference."""
    worst = 0.0
    assert [row[0] for row in found] == [row[0] for row in expected], "each step is in the record once"
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine[1:], theirs[1:], strict=True):
            assert (a is None) == (b is None), (mine, theirs)
            if a is not None:
                worst = max(worst, abs(a - b) / abs(b))
                assert worst <= tolerance, (mine, theirs)
    return worst


@pytest.mark.parametrize("optim", OPTIMIZERS if SOAK else ["muon", "shampoo"])
def test_every_sharding_goes_on_from_every_other(template, tmp_path, optim):
    steps = 2 * len(ROUND) + 2
    common = exact(optim, steps)
    run(template, [*common, f"run.dir={tmp_path}/whole"], LAYOUTS[0])
    for number, (mode, ranks) in enumerate([*ROUND, ROUND[0]]):
        stop = None if number == len(ROUND) else ["send", {"step": 2 * number + 1, "to": number % ranks}]
        job = run(template, [*common, f"run.dir={tmp_path}/parts"], (mode, ranks), stop)
        if number:
            before = ROUND[number - 1]
            assert f"{before[1]} ranks ({before[0]}) -> {ranks} ranks ({mode})" in job.output()
            assert f"going on after update {2 * number} of {steps}" in job.output()
    assert_same(losses(tmp_path / "parts"), losses(tmp_path / "whole"), 1e-9)


@pytest.mark.skipif(not SOAK, reason="the whole matrix: NANOMUON_SOAK=1")
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_whole_matrix_of_shardings(template, tmp_path, optim):
    common = exact(optim, 8)
    run(template, [*common, f"run.dir={tmp_path}/whole"], LAYOUTS[0])
    expected, worst, pairs = losses(tmp_path / "whole"), 0.0, 0
    for source in LAYOUTS:
        saved = f"{tmp_path}/{source[0]}{source[1]}"
        run(template, [*common, f"run.dir={saved}"], source, ["send", {"step": 3, "to": 0}])
        for target in LAYOUTS:
            mine = f"{saved}-{target[0]}{target[1]}"
            job = run(template, [*common, f"run.dir={mine}", f"run.from={saved}"], target)
            assert "going on after update 4 of 8" in job.output()
            worst, pairs = max(worst, assert_same(losses(mine), expected, 1e-9)), pairs + 1
    print(f"{optim}: {pairs} pairs of source and target, largest relative difference {worst:.1e}")


def test_a_finished_run_is_left_alone(template, tmp_path):
    """And W&B goes on with the same run, whoever starts it again."""
    directory = tmp_path / "run"
    common = [*TINY, "train.steps=6", "logger=wandb", f"run.dir={directory}"]
    template.run(common, 1, ["send", {"step": 3, "to": 0}])
    template.run(common)
    offline = {path.name for path in (directory / "wandb").glob("offline-run-*")}
    ids = {name.split("-")[3] for name in offline}  # offline-run-TIME-ID, and -1 if two began in one second
    assert ids == {json.loads((directory / "run.json").read_text())["id"]}
    before = own_files(directory)
    job = template.run(common)
    assert job.output().startswith(f"{directory} is finished: step 6") and len(job.output().splitlines()) == 1
    assert before == own_files(directory)
    assert offline == {path.name for path in (directory / "wandb").glob("offline-run-*")}


def own_files(directory) -> dict:
    """Without W&B's, whose service goes on writing its logs for a while after a run."""
    own = [path for path in directory.rglob("*") if path.relative_to(directory).parts[0] != "wandb"]
    assert {"metrics.jsonl", "run.json"} <= {path.name for path in own}
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in own}
