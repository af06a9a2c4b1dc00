"""Signals, lost ranks, lost launchers, full disks, NaNs: what all ranks do together, and what is left afterwards."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.distributed.forks import ROOT
from tests.distributed.jobs import TINY, Template, lines

pytestmark = pytest.mark.slow
SOAK = "NANOMUON_SOAK" in os.environ
COMMON = [*TINY, "parallel=fsdp", "logger.every=1", "eval.every=5", "eval.tokens=6144"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    with Template(tmp_path_factory.mktemp("jobs")) as started:
        yield started


def losses(directory) -> list[tuple]:
    return [(line["step"], line.get("train/loss"), line.get("val/loss")) for line in lines(directory)]


def last_step(directory) -> int:
    record = directory / "metrics.jsonl"
    return lines(directory)[-1]["step"] if record.exists() and record.stat().st_size else -1


def wait_until(condition, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.01)


def wait_for_step(directory, step: int) -> None:
    wait_until(lambda: last_step(directory) >= step)


def test_told_to_stop_at_any_moment(template, tmp_path):
    """One rank gets the signal; all of them save after the same update and leave with exit code 0."""
    ranks, times = 2, 20 if SOAK else 4
    common = [*COMMON, "train.steps=60"]
    template.run([*common, f"run.dir={tmp_path}/whole"], ranks)
    dice, parts = random.Random(5), tmp_path / "parts"
    often = [*common, f"run.dir={parts}", "checkpoint.every=2"]
    for _ in range(times):
        job = template.start(often, ranks, ["slow_saves", {"seconds": 0.05}])
        wait_until(lambda job=job: "run directory" in job.output())
        wait_for_step(parts, min(last_step(parts) + dice.choice([0, 1, 3]), 55))
        time.sleep(dice.random() * 0.2)
        number = dice.choice([signal.SIGTERM, signal.SIGUSR1])
        job.kill(dice.randrange(ranks), number)
        seen = last_step(parts)
        assert job.wait(30) == [0, 0], job.output()
        found = re.search(rf"stopped by {number.name} after update (\d+) of 60, and saved", job.output())
        if found is None:
            assert "final val loss" in job.output() or last_step(parts) == 60
            continue
        assert int(found[1]) <= seen + 2, "within one update"
        assert (parts / "checkpoints" / f"step_{int(found[1]):08d}" / "manifest.json").exists()
    template.run(often, ranks)
    assert losses(parts) == losses(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["first evaluation", "evaluation", "limit"])
def test_told_to_stop_where_it_matters(template, tmp_path, moment):
    common = [*COMMON, "train.steps=10"]
    template.run([*common, f"run.dir={tmp_path}/whole"], 2)
    hook = ["stop_in_evaluation", {"step": {"first evaluation": 0, "evaluation": 5, "limit": -1}[moment], "of": 1}]
    limit = ["train.max_minutes=0.0001"] if moment == "limit" else []
    job = template.run([*common, *limit, f"run.dir={tmp_path}/parts"], 2, hook)
    said = {"first evaluation": "SIGTERM after update 0", "evaluation": "SIGTERM after update 5"}
    assert f"stopped by {said.get(moment, 'train.max_minutes=0.0001 after update 0')} of 10, and saved" in job.output()
    assert last_step(tmp_path / "parts") == {"first evaluation": -1, "evaluation": 4, "limit": -1}[moment]
    job = template.run([*common, f"run.dir={tmp_path}/parts"], 2)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_rank_that_hangs_is_named(template, tmp_path):
    stop = ["send", {"step": 3, "to": 1, "number": signal.SIGSTOP}]
    job = template.start([*COMMON, "train.steps=30", "train.timeout_minutes=0.05", f"run.dir={tmp_path}/run"], 3, stop)
    wait_until(lambda: None not in (job.poll()[0], job.poll()[2]))
    assert job.poll() == [1, None, 1]
    assert "error: rank 1 of 3 died or hang" in job.output(0) + job.output(2)
    assert "Traceback" not in job.output(0)


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_nan_on_one_rank(template, tmp_path, policy):
    """The update is not applied on any rank, and the record says which batch it was."""
    watch = ["poison_and_digest", {"steps": [3], "on": 1, "path": str(tmp_path / "digest")}]
    arguments = [*COMMON, "parallel=ddp", "train.steps=8", f"train.non_finite={policy}", f"run.dir={tmp_path}/run"]
    job = template.start(arguments, 2, watch)
    codes = job.wait(60)
    line = next(line for line in lines(tmp_path / "run") if line["step"] == 4)
    assert line["grad_norm"] is None and (line["skipped"], line["batch"]) == (1, 3) and line["train/loss"] > 0
    if policy == "stop":
        assert codes == [1, 1] and "error: step 4 has loss" in job.output(0) + job.output(1)
        return
    assert codes == [0, 0]
    for rank in range(2):
        state = (tmp_path / f"digest.{rank}").read_text().splitlines()
        assert state[3] == state[4], "weights and optimizer state are untouched"
        assert len(set(state)) == 7
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(9))


def test_full_disk(template, tmp_path):
    """Saves that fail are shown and recorded; training and the old checkpoint stay."""
    common = [*COMMON, "train.steps=12"]
    template.run([*common, f"run.dir={tmp_path}/whole"], 2)
    full = ["full_disk", {"first": 5, "last": 9, "limit": 20_000}]
    job = template.start([*common, f"run.dir={tmp_path}/run", "checkpoint.every=2"], 2, full)
    assert job.wait(60) == [0, 0], job.output()
    assert "warning: a checkpoint failed, the one before it stays: rank 0: File too large" in job.output()
    failed = [line["step"] for line in lines(tmp_path / "run") if "checkpoint/failed" in line]
    assert len(failed) == 3 and set(failed) <= set(range(7, 13)), "the saves of steps 6, 8 and 10"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000012"]


# With torchrun itself --------------------------------------------------------------------------------------------


class Torchrun:
    def __init__(self, arguments: list[str], ranks: int, out, *options: str):
        self.out = out
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        launcher = ["torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone", *options]
        with open(out, "w") as file:
            self.process = psutil.Popen(
                [sys.executable, "-m", *launcher, "train.py", *arguments],
                env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> "Torchrun":
        return self

    def __exit__(self, *error: object) -> None:
        for process in [*self.workers(), self.process]:
            if process.is_running():
                process.kill()
        self.process.wait()

    def workers(self) -> list[psutil.Process]:
        """In the order of their ranks."""
        try:
            children = [child for child in self.process.children() if "train.py" in " ".join(child.cmdline())]
            return sorted(children, key=lambda child: int(child.environ()["RANK"]))
        except (psutil.NoSuchProcess, psutil.ZombieProcess, KeyError):
            return []

    def output(self) -> str:
        return self.out.read_text()


def test_with_torchrun(template, tmp_path):
    """The launcher is killed; started again, it loses a rank and restarts all; then it is told to stop."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steps = [*COMMON, "train.steps=300", "checkpoint.every=10", "eval.every=50"]
    template.run([*steps, f"run.dir={whole}"], 2)
    with Torchrun([*steps, f"run.dir={parts}"], 2, tmp_path / "first") as job:
        wait_for_step(parts, 5)
        workers = job.workers()
        job.process.send_signal(signal.SIGKILL)
        gone, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive and "stopped by the loss of its launcher" in job.output()
    with Torchrun([*steps, f"run.dir={parts}"], 2, tmp_path / "second", "--max-restarts=1") as job:
        wait_for_step(parts, last_step(parts) + 30)
        job.workers()[1].send_signal(signal.SIGKILL)
        wait_until(lambda: job.output().count("going on after update") == 2)
        assert re.search(r"local_rank: 1|rank 1 of 2 died", job.output()), "the lost rank is named"
        wait_for_step(parts, last_step(parts) + 5)
        job.process.send_signal(signal.SIGTERM)
        job.process.wait(60)
        assert "stopped by SIGTERM after update" in job.output()
    template.run([*steps, f"run.dir={parts}"], 2)
    assert losses(parts) == losses(whole)
