"""Processes in a fraction of a second: forks of one server that has imported everything.

    ranks = Ranks("tests.distributed.harness", {"any": "request"}, world_size=2, out=tmp_path)
    ranks.kill(1)                                               # SIGKILL
    codes = ranks.wait(timeout=60)                              # of every rank, negative for a signal
    ranks.output(0)                                             # stdout and stderr of rank 0

The module has ``child(request, prepare(request))``, which runs in the fork and returns its exit code; what ``prepare``
returns is made in the server, where it may be kept for the next fork.  All tests of a session share one server, which
ends with them and takes its forks along.
"""

import ctypes
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist

import common
from tests.runs import ROOT

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class ForkServer:
    """The server, seen from the tests."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-m", __name__], env=environment, cwd=ROOT, **pipes)

    def start(self, request: dict, log: Path, environment: dict[str, str]) -> int:
        """Fork a process for the request; returns its pid, which is also its process group."""
        return self._ask(request | {"fork": {"log": str(log), "environment": environment}})["pid"]

    def poll(self, pid: int) -> int | None:
        """Its exit code, negative for a signal; None while it runs.  To be asked once after its end."""
        return self._ask({"poll": pid})["code"]

    def _ask(self, request: dict) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the server of forks has ended with code {self.process.poll()}"
        return json.loads(answer)


@functools.cache
def server() -> ForkServer:
    return ForkServer()


class Ranks:
    """Forks that work together, with torchrun's environment, except that nobody restarts them or kills the rest when
    one has died.

    Args:
        module: whose ``child`` they run.
        out: an empty folder for what they print.
        launched: False: a process that no launcher has started.
        timeout: seconds that one waits for the others to come.
    """

    def __init__(self, module: str, request: dict, world_size: int, out: Path, launched: bool = True,
                 timeout: float = 300):  # fmt: skip
        self.out, self.codes = out, {}
        self.store = _rendezvous(timeout) if launched else None
        environments = [_torchrun(rank, world_size, self.store.port) if launched else {} for rank in range(world_size)]
        request = request | {"module": module}
        self.pids = [server().start(request | {"rank": rank}, out / str(rank), environment)
                     for rank, environment in enumerate(environments)]  # fmt: skip

    def poll(self) -> list[int | None]:
        """Exit codes so far."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (code := server().poll(pid)) is not None:
                self.codes[rank] = code
        return [self.codes.get(rank) for rank in range(len(self.pids))]

    def wait(self, timeout: float = 120, all_end: bool = True) -> list[int | None]:
        """Exit codes, once every rank has ended; or, if not ``all_end``, once one of them has failed.

        Raises:
            AssertionError: they took longer than ``timeout`` seconds, and have been killed.
        """
        deadline = time.monotonic() + timeout
        while None in (codes := self.poll()) and (all_end or not any(codes)):
            if time.monotonic() > deadline:
                late = [rank for rank, code in enumerate(codes) if code is None]
                self.kill_all()
                raise AssertionError(f"ranks {late} did not end within {timeout} s\n{self.outputs(late)}")
            time.sleep(0.01)
        return codes

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        if self.poll()[rank] is None:
            os.kill(self.pids[rank], number)

    def kill_all(self) -> None:
        """With the processes that they have started."""
        while None in (codes := self.poll()):
            for pid, code in zip(self.pids, codes, strict=True):
                if code is None:
                    with suppress(ProcessLookupError):  # a fork that has only just begun has no group yet
                        os.killpg(pid, signal.SIGKILL)
            time.sleep(0.01)

    def output(self, rank: int = 0) -> str:
        """What it has printed; nothing yet if it has only just begun."""
        log = self.out / str(rank)
        return log.read_text() if log.exists() else ""

    def outputs(self, ranks: list[int], characters: int = 3000) -> str:
        """The ends of what they printed."""
        return "\n".join(f"rank {rank}:\n{self.output(rank)[-characters:]}" for rank in ranks)


def _rendezvous(timeout: float) -> dist.TCPStore:
    """The parent serves it on a port that the kernel picks, as torchrun's agent does: no port can be taken between
    the choice and the use."""
    limit = timedelta(seconds=timeout)
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)


def _torchrun(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip


def serve() -> None:
    """Answer requests until the tests are gone."""
    import accelerate  # noqa: F401  # with what else a fork would import by itself, each time
    import matplotlib.pyplot  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo  # noqa: F401  # optimizers import it when they are built
    import torch.distributed.fsdp  # noqa: F401
    import wandb  # noqa: F401

    from trainer import loop  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            module = importlib.import_module(request["module"])
            prepared = module.prepare(request)
            pid = os.fork()
            if pid == 0:
                _run(module, request, prepared)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _run(module: ModuleType, request: dict, prepared: Any) -> None:
    """In the fork; it never returns, and never ends the interpreter: what that would wait for is the server's."""
    code = 1
    try:
        if LIBC:
            LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: go with the server
        os.setsid()
        fork = request["fork"]
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(fork["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(fork["environment"])
        common.LAUNCHER = os.getppid()  # a process that had not been forked would find it so
        code = module.child(request, prepared) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
