"""Run a function in W processes joined by gloo on loopback.

    from tests.distributed.harness import run_workers

    def worker(rank, world_size, matrix_rows):                      # at module level in the test file
        dist.init_process_group("gloo")                             # or trainer.parallel.setup(...)
        return {"loss": 1.0, "weight": torch.zeros(matrix_rows)}    # plain data and tensors

    @pytest.mark.slow
    def test_it(tmp_path):
        results = run_workers(worker, 3, tmp_path, timeout=60, matrix_rows=7)     # results[rank]; keyword
        assert results[0]["loss"] == results[2]["loss"]                           # arguments must fit in JSON

Every process has torchrun's environment and one thread.  If a rank fails or is late, all are killed, and an
AssertionError shows the end of what it printed.
"""

import importlib.util
import inspect
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.forks import Ranks


def run_workers(worker: Callable, world_size: int, tmp_path: Path, *, timeout: float = 300, **kwargs) -> list:
    """Call `worker(rank, world_size, **kwargs)` in each process; return what each rank returned, in rank order."""
    out = Path(tmp_path) / f"workers{time.monotonic_ns()}"
    out.mkdir(parents=True)
    request = {"source": inspect.getsourcefile(worker), "name": worker.__qualname__, "kwargs": kwargs, "out": str(out)}
    ranks = Ranks(__name__, request, world_size, out, timeout=timeout)
    try:
        if any(ranks.wait(timeout, all_end=False)):
            time.sleep(0.5)  # the first to fail is often the victim of another: let that one fail too
            failed = {rank: code for rank, code in enumerate(ranks.poll()) if code}
            raise AssertionError(f"exit codes {failed}\n{ranks.outputs(list(failed))}")
    finally:
        ranks.kill_all()
    return [torch.load(out / f"result{rank}.pt", weights_only=True) for rank in range(world_size)]


def prepare(request: dict) -> None:
    """Nothing that forks could share."""


def child(request: dict, prepared: None) -> None:
    """In the fork: import the test file by path and call its function."""
    spec = importlib.util.spec_from_file_location("worker_module", request["source"])
    module = importlib.util.module_from_spec(spec)
    sys.modules["worker_module"] = module
    spec.loader.exec_module(module)
    rank, world_size = request["rank"], int(os.environ["WORLD_SIZE"])
    torch.manual_seed(1000 + rank)  # no test may pass because ranks happen to share a random state
    result = getattr(module, request["name"])(rank, world_size, **request["kwargs"])
    torch.save(result, Path(request["out"]) / f"result{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
