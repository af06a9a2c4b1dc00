"""Run a function in W processes joined by gloo on loopback.

    from tests.distributed.harness import run_workers

    def worker(rank, world_size, matrix_rows):                      # at module level in the test file
        dist.init_process_group("gloo")                             # or trainer.parallel.setup(...)
        return {"loss": 1.0, "weight": torch.zeros(matrix_rows)}    # plain data and tensors

    @pytest.mark.slow
    def test_it(tmp_path):
        results = run_workers(worker, 3, tmp_path, timeout=60, matrix_rows=7)     # results[rank]; keyword
        assert results[0]["loss"] == results[2]["loss"]                           # arguments must fit in JSON

Every process has torchrun's environment and one thread. A failed or late rank kills all of them and raises
WorkerError with the end of its stderr.
"""

import functools
import importlib.util
import inspect
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.forks import Forks, rank_environment, rendezvous, serve


class WorkerError(AssertionError):
    """A rank failed or did not finish in time."""


@functools.cache
def server() -> Forks:
    return Forks(__file__)


def run_workers(worker: Callable, world_size: int, tmp_path: Path, *, timeout: float = 300, **kwargs) -> list:
    """Call `worker(rank, world_size, **kwargs)` in each process; return what each rank returned, in rank order."""
    out = Path(tmp_path) / f"workers{time.monotonic_ns()}"
    out.mkdir(parents=True)
    store = rendezvous(timeout)
    request = {"source": inspect.getsourcefile(worker), "name": worker.__qualname__, "kwargs": kwargs, "out": str(out)}
    pids = [
        server().start(request, out / f"stdout{rank}", out / f"stderr{rank}",
                       rank_environment(rank, world_size, store.port))
        for rank in range(world_size)
    ]  # fmt: skip
    codes: dict[int, int] = {}
    try:
        _wait(pids, codes, out, timeout)
    finally:
        for pid in pids:
            if pid not in codes:
                os.killpg(pid, signal.SIGKILL)
                while server().poll(pid) is None:
                    time.sleep(0.02)
    return [torch.load(out / f"result{rank}.pt", weights_only=True) for rank in range(world_size)]


def _wait(pids: list[int], codes: dict[int, int], out: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while len(codes) < len(pids):
        _poll(pids, codes)
        if any(codes.values()):
            time.sleep(0.5)  # the first to fail is often the victim of another: let that one fail too
            _poll(pids, codes)
            failed = [rank for rank, pid in enumerate(pids) if codes.get(pid)]
            raise WorkerError("\n".join(f"rank {r} exited with {codes[pids[r]]}:\n{_tail(out, r)}" for r in failed))
        if time.monotonic() > deadline:
            late = [rank for rank, pid in enumerate(pids) if pid not in codes]
            logs = "\n".join(f"rank {r}:\n{_tail(out, r)}" for r in late)
            raise WorkerError(f"ranks {late} did not finish within {timeout} s\n{logs}")
        time.sleep(0.01)


def _poll(pids: list[int], codes: dict[int, int]) -> None:
    for pid in pids:
        if pid not in codes and (code := server().poll(pid)) is not None:
            codes[pid] = code


def _tail(out: Path, rank: int, characters: int = 3000) -> str:
    return "".join((out / f"{stream}{rank}").read_text()[-characters:] for stream in ("stdout", "stderr"))


def _call(request: dict, prepared: None) -> None:
    """In the fork: import the test file by path and call its function."""
    spec = importlib.util.spec_from_file_location("worker_module", request["source"])
    module = importlib.util.module_from_spec(spec)
    sys.modules["worker_module"] = module
    spec.loader.exec_module(module)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(1000 + rank)  # no test may pass because ranks happen to share a random state
    result = getattr(module, request["name"])(rank, world_size, **request["kwargs"])
    torch.save(result, Path(request["out"]) / f"result{rank}.pt")
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    serve(_call)
