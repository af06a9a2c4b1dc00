"""Processes in a fraction of a second: forks of one server that has imported everything.

    forks = Forks("tests/distributed/harness.py")       # a script that calls serve(...)
    pid = forks.start({"any": "request"}, stdout, stderr, rank_environment(0, 2, store.port))
    forks.poll(pid)                                     # its exit code, negative for a signal; None: it still runs

The server ends with whoever started it, and takes its forks along.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Forks:
    """The server, seen from the tests."""

    def __init__(self, script: str):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, script], env=environment, cwd=ROOT, **pipes)

    def start(self, request: dict, stdout: Path, stderr: Path, environment: dict[str, str]) -> int:
        """Fork a process for the request; returns its pid, which is also its process group."""
        fork = {"stdout": str(stdout), "stderr": str(stderr), "environment": environment}
        return self._ask(request | {"fork": fork})["pid"]

    def poll(self, pid: int) -> int | None:
        return self._ask({"poll": pid})["code"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _ask(self, request: dict) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def rendezvous(timeout: float) -> dist.TCPStore:
    """The parent serves it on a port that the kernel picks, as torchrun's agent does: no port can be taken between
    the choice and the use."""
    limit = timedelta(seconds=timeout)
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip


def serve(child: Callable[[dict, Any], int | None], prepare: Callable[[dict], Any] = lambda request: None) -> None:
    """Answer requests until the tests are gone.  ``child(request, prepare(request))`` runs in the fork and returns
    its exit code; what ``prepare`` returns is made here, where it may be kept for the next fork."""
    import matplotlib.pyplot  # noqa: F401
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
            prepared = prepare(request)
            pid = os.fork()
            if pid == 0:
                _run(child, request, prepared)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _run(child: Callable[[dict, Any], int | None], request: dict, prepared: Any) -> None:
    """In the fork; it never returns, and never ends the interpreter: what that would wait for is the server's."""
    code = 1
    try:
        if LIBC:
            LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: go with the server
        os.setsid()
        fork = request["fork"]
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, stream in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(fork[stream], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644), descriptor)
        os.environ.update(fork["environment"])
        code = child(request, prepared) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
