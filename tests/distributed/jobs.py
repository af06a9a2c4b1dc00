"""Start training jobs in a fraction of a second: every rank is a fork of one process that has imported everything.

    with Template(tmp_path) as template:
        job = template.start(["experiment=smoke", "run.dir=…"], ranks=2, hook=["poison", {"step": 3}])
        job.kill(rank=1)                     # SIGKILL
        codes = job.wait(timeout=60)         # of every rank, negative for a signal
        job.output(0)                        # stdout and stderr of rank 0

Ranks see what torchrun would show them, except that nobody restarts them or kills the rest when one has died.  A hook
is a function ``(rank, **arguments)`` of hooks.py, called in every rank before training begins.
"""

import functools
import json
import os
import signal
import time
from pathlib import Path

import torch.distributed as dist
from omegaconf import DictConfig

from tests.distributed.forks import Forks, rank_environment, rendezvous, serve

# The smallest run in which everything takes part: an update takes some 20 ms.
TINY = ["experiment=smoke", "logger=jsonl", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "train.seq_len=16",
        "train.batch_tokens=384", "eval.tokens=1536", "train.timeout_minutes=1"]  # fmt: skip


class Template:
    """The process that is forked; ``with`` ends it and all that it started."""

    def __init__(self, folder: Path):
        self.folder, self.jobs, self.forks = Path(folder), [], Forks(__file__)

    def __enter__(self) -> "Template":
        return self

    def __exit__(self, *error: object) -> None:
        for job in self.jobs:
            for rank in range(len(job.pids)):
                job.kill(rank)
        self.forks.close()

    def start(self, arguments: list[str], ranks: int = 1, hook: list | None = None) -> "Job":
        out = self.folder / f"job{len(self.jobs)}"
        out.mkdir(parents=True)
        store = rendezvous(300) if ranks > 1 else None
        pids = []
        for rank in range(ranks):
            environment = {} if store is None else rank_environment(rank, ranks, store.port)
            request = {"arguments": arguments, "hook": hook, "rank": rank}
            pids.append(self.forks.start(request, out / str(rank), out / str(rank), environment))
        self.jobs.append(Job(self, pids, out, store))
        return self.jobs[-1]

    def run(self, arguments: list[str], ranks: int = 1, hook: list | None = None, timeout: float = 120) -> "Job":
        """Start a job and wait for its success."""
        job = self.start(arguments, ranks, hook)
        codes = job.wait(timeout)
        assert not any(codes), f"exit codes {codes}\n" + "\n".join(job.output(r)[-3000:] for r in range(ranks))
        return job


class Job:
    def __init__(self, template: Template, pids: list[int], out: Path, store: dist.TCPStore | None):
        self.template, self.pids, self.out, self.store = template, pids, out, store
        self.codes: dict[int, int] = {}

    def poll(self) -> list[int | None]:
        """Exit codes so far."""
        for rank, pid in enumerate(self.pids):
            code = self.codes.get(rank) if rank in self.codes else self.template.forks.poll(pid)
            if code is not None:
                self.codes[rank] = code
        return [self.codes.get(rank) for rank in range(len(self.pids))]

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes of all ranks, which are killed if they take longer than ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while None in self.poll():
            if time.monotonic() > deadline:
                late = [rank for rank, code in enumerate(self.poll()) if code is None]
                logs = "\n".join(self.output(rank)[-2000:] for rank in late)
                for rank in late:
                    self.kill(rank)
                raise AssertionError(f"ranks {late} did not end within {timeout} s\n{logs}")
            time.sleep(0.02)
        return self.poll()

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        if self.poll()[rank] is None:
            os.kill(self.pids[rank], number)

    def kill_all(self) -> None:
        for rank in range(len(self.pids)):
            self.kill(rank)
        self.wait(20)

    def output(self, rank: int = 0) -> str:
        return (self.out / str(rank)).read_text()


def lines(directory: Path) -> list[dict]:
    """The record of a run."""
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def _train(request: dict, composed: DictConfig) -> int:
    """In the fork: what trainer/launch/job.py does."""
    from common import UserError
    from tests.distributed import hooks
    from trainer.config import world_size
    from trainer.launch.compose import check
    from trainer.launch.failures import report_failed_ranks
    from trainer.launch.rendezvous import broadcast_rank0, report_error
    from trainer.loop import Trainer
    from trainer.metrics import record
    from trainer.run import resume
    from trainer.run.directory import acquire_run_dir

    record.loss_vs_time = lambda *arguments: None  # a second, and tested elsewhere
    if request["hook"]:
        name, arguments = request["hook"]
        getattr(hooks, name)(request["rank"], **arguments)
    try:
        config = check(composed, world_size())
        config.run.dir = broadcast_rank0("job", lambda: acquire_run_dir(config))
        done = broadcast_rank0("finished", lambda: resume.finished(config))
        with report_failed_ranks():
            print(done) if done else Trainer(config).run()
    except UserError as error:
        report_error(error)
        return 1
    return 0


@functools.cache
def _compose(arguments: tuple[str, ...]) -> DictConfig:
    from trainer.launch.compose import compose

    return compose(arguments)


if __name__ == "__main__":
    serve(_train, lambda request: _compose(tuple(request["arguments"])))
