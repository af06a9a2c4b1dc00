"""Signals, lost ranks, lost launchers, full disks, NaNs: what all ranks do together, and what is left afterwards.

``NANOMUON_SOAK=1`` runs the campaigns at full length; ``-s`` shows what they hit.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path

import psutil
import pytest

from tests.errors import check_names, error_lines
from tests.runs import ROOT, TINY, read_losses, read_record
from trainer.metrics.jsonl import FILE, read_lines

pytestmark = pytest.mark.slow
SOAK = "NANOMUON_SOAK" in os.environ
COMMON = [*TINY, "parallel=fsdp", "logger.every=1", "eval.every=5", "eval.tokens=6144"]
PATIENCE = 240  # seconds; a limit for machines that are slow and busy, not a measure


def last_step(directory) -> int:
    """In the lines that are written to their end; -1 if there is none."""
    steps = [line["step"] for line in read_lines(directory / FILE)]
    return steps[-1] if steps else -1


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s"
        time.sleep(0.005)


def reach(moment: str, job, directory, dice: random.Random, more=(0, 3), pace=0.05) -> None:
    """Until some instant of the job's start, of its updates and evaluations, or of a save; or until it has ended.

    Args:
        more: fewest and most updates that it does before.
        pace: seconds of a few updates of the smallest run, or of one of a larger run.
    """
    if moment == "start":
        return time.sleep(6 * pace * dice.random())
    wait_until(lambda: ended(job) or "run directory" in job.output())
    step = last_step(directory) + dice.randint(*more)
    wait_until(lambda: ended(job) or last_step(directory) >= step)
    if moment == "save":
        wait_until(lambda: ended(job) or saving(directory))
    time.sleep(dice.random() * (pace / 5 if moment == "save" else pace))


def ended(job) -> bool:
    return None not in job.poll()


def saving(directory) -> bool:
    return any((directory / "checkpoints").glob("step_*.partial"))


def test_told_to_stop_at_any_moment(template, tmp_path):
    """One rank gets the signal; all of them save after the same update and leave with exit code 0."""
    ranks, times = 2, 20 if SOAK else 3
    dice, parts, counts = random.Random(5), tmp_path / "parts", Counter()
    common = [*COMMON, f"train.steps={16 * times}"]
    template.run([*common, f"run.dir={tmp_path}/whole"], ranks, timeout=10 * PATIENCE)
    for number in range(times):
        job = template.start([*common, f"run.dir={parts}", "checkpoint.every=2"], ranks)
        reach(["update", "save"][number % 2], job, parts, dice)
        told = dice.choice([signal.SIGTERM, signal.SIGUSR1])
        counts["saving"] += saving(parts)
        job.kill(dice.randrange(ranks), told)
        seen = last_step(parts)
        assert job.wait(PATIENCE) == [0] * ranks, job.output()
        found = re.search(rf"stopped by {told.name} after update (\d+) of \d+; to go on", job.output())
        assert found, job.output()
        step = int(found[1])
        assert step <= seen + 2, "the update in which the signal came, or the one after"
        assert (parts / "checkpoints" / f"step_{step:08d}" / "manifest.json").exists()
        counts["evaluating"] += step > last_step(parts)
    template.run([*common, f"run.dir={parts}"], ranks, timeout=10 * PATIENCE)
    assert read_losses(parts) == read_losses(tmp_path / "whole")
    print(f"{times} signals, {counts['saving']} while saving, {counts['evaluating']} while evaluating")


def test_told_to_stop_where_it_matters(template, tmp_path):
    common = [*COMMON, "train.steps=10"]
    template.run([*common, f"run.dir={tmp_path}/whole"], 2)
    for step, reason in [(0, "SIGTERM"), (5, "SIGTERM"), (0, "train.max_minutes=0.0001")]:
        parts, by_signal = tmp_path / f"{reason[:7]}{step}", reason == "SIGTERM"
        hook = ["stop_in_evaluation", {"step": step if by_signal else -1, "of": 1}]
        job = template.run([*common, f"run.dir={parts}", *([] if by_signal else [reason])], 2, hook)
        assert f"stopped by {reason} after update {step} of 10; to go on" in job.output()
        assert last_step(parts) == (step or -1)
        assert all("val/loss" not in line for line in read_record(parts)[step:]), "the evaluation is still to be done"
        template.run([*common, f"run.dir={parts}"], 2)
        assert read_losses(parts) == read_losses(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_rank_is_named(template, tmp_path, number):
    """One that hangs, after the time limit; one that died, at once."""
    lost = ["send", {"step": 3, "to": 1, "number": number}]
    job = template.start([*COMMON, "train.steps=30", "train.timeout_minutes=0.15", f"run.dir={tmp_path}/run"], 3, lost)
    wait_until(lambda: None not in (job.poll()[0], job.poll()[2]))
    assert job.poll() == [1, None if number == signal.SIGSTOP else -number, 1]
    assert "error: rank 1 of 3 died or hang" in job.output(0) + job.output(2)
    assert "Traceback" not in job.output(0) + job.output(2)


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_nan_on_one_rank(template, tmp_path, policy):
    """The update is not applied on any rank, and the record says which batch it was."""
    watch = ["poison_and_digest", {"steps": [3], "on": 1, "path": str(tmp_path / "digest")}]
    arguments = [*COMMON, "parallel=ddp", "train.steps=8", f"train.non_finite={policy}", f"run.dir={tmp_path}/run"]
    job = template.start(arguments, 2, watch)
    codes = job.wait(PATIENCE)
    line = next(line for line in read_record(tmp_path / "run") if line["step"] == 4)
    assert line["grad_norm"] is None and (line["skipped"], line["batch"]) == (1, 3) and line["train/loss"] > 0
    if policy == "stop":
        assert codes == [1, 1] and "error: step 4 has loss" in job.output(0) + job.output(1)
        return
    assert codes == [0, 0]
    for rank in range(2):
        state = (tmp_path / f"digest.{rank}").read_text().splitlines()
        assert state[3] == state[4], "weights and optimizer state are untouched"
        assert len(set(state)) == 7
    assert [line["step"] for line in read_record(tmp_path / "run")] == list(range(9))


@pytest.mark.parametrize(
    ("mode", "ranks", "tensor"),
    [
        ("ddp", 2, "blocks.0.mlp.fc.weight"),
        ("ddp", 2, "state.blocks.0.mlp.fc.weight.momentum"),
        ("ddp", 3, "average.blocks.0.mlp.fc.weight"),
        ("hsdp", 4, "blocks.0.mlp.fc.weight"),
        ("hsdp", 4, "state.wte.weight.exp_avg"),
    ],
)
def test_a_replica_that_differs_is_named(template, tmp_path, mode, ranks, tensor):
    """At the next evaluation, before anything is measured with it.  A rank holds bfloat16 weights in a pass alone."""
    flip = ["flip_bit", {"step": 9, "on": 1, "tensor": tensor}]
    arguments = [*COMMON, f"parallel={mode}", "train.batch_tokens=768", "train.steps=15", f"run.dir={tmp_path}/run"]
    job = template.start([*arguments, "average.blend=0.5", "train.dtype=bfloat16"], ranks, flip)
    assert job.wait(PATIENCE) == [1] * ranks
    [error] = set(error_lines("".join(job.output(rank) for rank in range(ranks))))
    weight = tensor.removeprefix("state.").removesuffix(".exp_avg")  # Adam's state shows in its weights at once
    check_names(error, weight, "rank 1 " if ranks == 3 else "ranks ", "run.from")
    assert [line["step"] for line in read_record(tmp_path / "run") if "val/loss" in line] == [0, 5]


def test_full_disk(template, tmp_path):
    """Saves that fail are shown and recorded; training and the old checkpoint stay."""
    common = [*COMMON, "train.steps=12"]
    template.run([*common, f"run.dir={tmp_path}/whole"], 2)
    full = ["full_disk", {"first": 5, "last": 9, "limit": 20_000}]
    job = template.start([*common, f"run.dir={tmp_path}/run", "checkpoint.every=2"], 2, full)
    assert job.wait(PATIENCE) == [0, 0], job.output()
    assert "warning: a checkpoint failed, the one before it stays: rank 0: File too large" in job.output()
    failed = [line["step"] for line in read_record(tmp_path / "run") if "checkpoint/failed" in line]
    assert job.output().count("a checkpoint failed") == 3, "the saves of steps 6, 8 and 10"
    assert failed and set(failed) <= set(range(7, 13)), "a line tells of one failure at most"
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000012"]


# Killed ----------------------------------------------------------------------------------------------------------


class Torchrun:
    """A job under torchrun itself."""

    def __init__(self, arguments: list[str], ranks: int, out: Path, *options: str):
        self.out = out
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        launcher = ["torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone", *options]
        with out.open("w") as file:
            self.process = psutil.Popen(
                [sys.executable, "-m", *launcher, "train.py", *arguments],
                env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.started: list[psutil.Process] = []

    def __enter__(self) -> "Torchrun":
        return self

    def __exit__(self, *error: object) -> None:
        for process in [*self.started, *self.workers(), self.process]:
            if process.is_running():
                process.kill()
        self.process.wait()

    def poll(self) -> list[int | None]:
        return [self.process.poll()]

    def workers(self) -> list[psutil.Process]:
        """In the order of their ranks."""
        found = {}
        for child in self.process.children() if self.process.is_running() else ():
            with suppress(psutil.NoSuchProcess, KeyError):  # it has just ended, or just begun
                if "train.py" in " ".join(child.cmdline()):
                    found[int(child.environ()["RANK"])] = child
        self.started = [found[rank] for rank in sorted(found)]
        return self.started

    def kill_launcher(self) -> None:
        """Its workers must save and leave by themselves."""
        workers = self.workers()
        assert workers, self.output()
        self.process.kill()
        self.process.wait()
        wait_until(lambda: all(map(gone, workers)))

    def output(self) -> str:
        return self.out.read_text()


def gone(process: psutil.Process) -> bool:
    """Ended, whether or not somebody has asked for its exit code."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_with_torchrun(template, tmp_path):
    """It loses a rank and restarts all, which go on by themselves; then the launcher itself is killed."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = [*COMMON, "train.steps=100", "eval.every=50"]
    with Torchrun([*common, f"run.dir={parts}", "checkpoint.every=5"], 2, tmp_path / "said", "--max-restarts=1") as job:
        wait_until(lambda: last_step(parts) >= 20)
        job.workers()[1].kill()
        wait_until(lambda: "going on after update" in job.output())
        assert re.search(r"local_rank: 1|rank 1 of 2 died", job.output()), "the lost rank is named"
        step = last_step(parts)
        wait_until(lambda: last_step(parts) >= step + 5)
        job.kill_launcher()
        assert "stopped by the loss of its launcher" in job.output()
    for directory in (parts, whole):
        template.run([*common, f"run.dir={directory}"], 2)
    assert read_losses(parts) == read_losses(whole)


def test_a_launcher_that_goes_at_once_takes_its_workers_along(tmp_path):
    """They would wait for its store for minutes."""
    with Torchrun([*COMMON, f"run.dir={tmp_path}/run"], 2, tmp_path / "said") as job:
        wait_until(lambda: len(job.workers()) == 2)
        time.sleep(0.5)  # python itself has begun
        job.kill_launcher()
        assert "error: the launcher has gone before the run began" in job.output()


@pytest.mark.parametrize("optim", ["muon", "adamw", "shampoo", "soap"] if SOAK else ["muon", "soap"])
def test_killed_again_and_again(template, tmp_path, optim):
    """kill -9 of one rank, of all, of the launcher, at any moment; the curve is the same to the last bit."""
    # At least 6 lines after an empty record: the one of step 5 comes after the checkpoint of step 2.
    kills, more, pace, steps = (30, (0, 2), 0.15, 60) if SOAK else (3, (6, 9), 0.05, 60)
    size = ["experiment=smoke", "logger=jsonl", "parallel=fsdp", "eval.tokens=9216"] if SOAK else COMMON
    often = {"shampoo": ["optim.matrix.update_freq=2"], "soap": ["optim.matrix.update_freq=2"]}.get(optim, [])
    common = [*size, f"optim={optim}", *often, f"train.steps={steps}", "eval.every=10"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    template.run([*common, f"run.dir={whole}"], 2, timeout=10 * PATIENCE)
    dice, counts = random.Random(optim), Counter()
    arguments = [*common, f"run.dir={parts}", "checkpoint.every=2"]
    for number in range(kills):
        moment = ["start", "update", "save"][number % 3]
        victim = dice.choice(["one rank", "all ranks", "launcher"] if SOAK else ["one rank", "all ranks"])
        if victim == "launcher":
            job, moment = Torchrun(arguments, 2, tmp_path / str(number)), "save" if moment == "save" else "update"
        else:
            job = template.start(arguments, 2)
        with job if victim == "launcher" else nullcontext():
            reach(moment, job, parts, dice, more, pace)
            counts += Counter([victim, f"at {moment}"] + ["while a save is on disk"] * saving(parts))
            assert not ended(job), job.output()
            if victim == "launcher":
                job.kill_launcher()
            else:
                job.kill(dice.randrange(2))
                time.sleep(pace * dice.random() * (victim == "one rank"))
                job.kill_all()  # torchrun would do so
        counts["gone on"] += "going on after update" in job.output()
        assert "is not used" not in job.output(), "a killed save never leaves a damaged checkpoint"
    job = template.run(arguments, 2, timeout=10 * PATIENCE)
    assert "going on after update" in job.output() and not saving(parts)
    assert [row[0] for row in read_losses(parts)] == list(range(steps + 1))
    assert read_losses(parts) == read_losses(whole)
    print(f"{optim}: {kills} kills, {dict(counts)}")
