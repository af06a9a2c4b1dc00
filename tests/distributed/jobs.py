"""Start training jobs in a fraction of a second: every rank is a fork of one process that has imported everything.

    with Template(tmp_path) as template:
        job = template.start(["experiment=smoke", "run.dir=…"], ranks=2, hook="hooks.py:at_step_3")
        job.kill(rank=1)                     # SIGKILL
        codes = job.wait(timeout=60)         # of every rank, negative for a signal
        job.output(0)                        # stdout and stderr of rank 0

Ranks see what torchrun would show them, except that nobody restarts them or kills the rest when one has died.  A hook
is a function ``(rank)`` of a Python file, called in every rank before training begins: it may change anything.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]

# The smallest run in which everything takes part: an update takes some 20 ms.
TINY = ["experiment=smoke", "logger=jsonl", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "train.seq_len=16",
        "train.batch_tokens=384", "eval.tokens=1536", "train.timeout_minutes=1"]  # fmt: skip


class Template:
    """The process that is forked; ``with`` ends it and all that it started."""

    def __init__(self, folder: Path):
        self.folder, self.jobs = Path(folder), []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def __enter__(self) -> "Template":
        return self

    def __exit__(self, *error: object) -> None:
        for job in self.jobs:
            for rank in range(len(job.pids)):
                job.kill(rank)
        self.process.kill()
        self.process.wait()

    def ask(self, request: dict) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, arguments: list[str], ranks: int = 1, hook: str | None = None) -> "Job":
        out = self.folder / f"job{len(self.jobs)}"
        out.mkdir(parents=True)
        store = None
        if ranks > 1:  # as torchrun's agent does, on a port that the kernel picks
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5))
        pids = []
        for rank in range(ranks):
            environment = {} if store is None else rank_environment(rank, ranks, store.port)
            request = {"arguments": arguments, "environment": environment, "hook": hook, "rank": rank}
            pids.append(self.ask(request | {"output": str(out / str(rank))})["pid"])
        self.jobs.append(Job(self, pids, out, store))
        return self.jobs[-1]

    def run(self, arguments: list[str], ranks: int = 1, hook: str | None = None, timeout: float = 120) -> "Job":
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
            code = self.codes.get(rank) if rank in self.codes else self.template.ask({"poll": pid})["code"]
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


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip


def lines(directory: Path) -> list[dict]:
    """The record of a run."""
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def call(hook: str, rank: int) -> None:
    path, _, name = hook.rpartition(":")
    spec = importlib.util.spec_from_file_location("hooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, name)(rank)


def _train(request: dict) -> int:
    """In a fork: become the rank that the request describes."""
    os.setsid()
    out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["environment"])
    sys.argv = ["train.py", *request["arguments"]]
    from trainer import launch
    from trainer.loop import Trainer

    try:
        if request["hook"]:
            call(request["hook"], request["rank"])
        launch.main(lambda config: Trainer(config).run() and None)
    except SystemExit as leaving:
        return leaving.code or 0
    return 0


def _serve() -> None:
    import wandb  # noqa: F401

    from trainer import launch, loop  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    code = _train(request)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
