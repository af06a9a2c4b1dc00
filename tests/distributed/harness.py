"""Run a function, or a command, in W processes joined by gloo on loopback.

    from tests.distributed.harness import run_workers

    def worker(rank, world_size, matrix_rows):                      # at module level in the test file
        dist.init_process_group("gloo")                             # or trainer.parallel.setup(...)
        return {"loss": 1.0, "weight": torch.zeros(matrix_rows)}    # plain data and tensors

    @pytest.mark.slow
    def test_it(tmp_path):
        results = run_workers(worker, 3, tmp_path, timeout=60, matrix_rows=7)     # results[rank]; keyword
        assert results[0]["loss"] == results[2]["loss"]                           # arguments must fit in JSON

`run_command([sys.executable, "train.py", ...], 2, tmp_path)` does the same for a command and returns each rank's
output. Every process has torchrun's environment and one thread. A failed or late rank kills all of them and raises
WorkerError with the end of its stderr.
"""

import ctypes
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class WorkerError(AssertionError):
    """A rank failed or did not finish in time."""


def run_workers(
    worker: Callable, world_size: int, tmp_path: Path, *, timeout: float = 300, env: dict | None = None, **kwargs
) -> list:
    """Call `worker(rank, world_size, **kwargs)` in each process; return what each rank returned, in rank order."""
    out = _fresh_folder(tmp_path)
    source = inspect.getsourcefile(worker)
    command = [sys.executable, __file__, source, worker.__qualname__, json.dumps(kwargs), str(out)]
    _run(command, world_size, out, timeout, env or {})
    return [torch.load(out / f"result{rank}.pt", weights_only=True) for rank in range(world_size)]


def run_command(
    command: list[str],
    world_size: int,
    tmp_path: Path,
    *,
    timeout: float = 300,
    env: dict | None = None,
    cwd: Path = ROOT,
) -> list[str]:
    """Run the same command as every rank; return each rank's stdout."""
    out = _fresh_folder(tmp_path)
    _run(command, world_size, out, timeout, env or {}, cwd)
    return [(out / f"stdout{rank}").read_text() for rank in range(world_size)]


def _fresh_folder(tmp_path: Path) -> Path:
    out = Path(tmp_path) / f"workers{time.monotonic_ns()}"
    out.mkdir(parents=True)
    return out


def _run(command: list[str], world_size: int, out: Path, timeout: float, env: dict, cwd: Path = ROOT) -> None:
    # The parent serves the rendezvous on a port that the kernel picks, as torchrun's agent does: no port can be
    # taken between the choice and the use.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    processes = []
    try:
        for rank in range(world_size):
            full = os.environ | _rank_env(rank, world_size, store.port) | {k: str(v) for k, v in env.items()}
            with open(out / f"stdout{rank}", "w") as stdout, open(out / f"stderr{rank}", "w") as stderr:
                processes.append(subprocess.Popen(
                    command, env=full, cwd=cwd, stdout=stdout, stderr=stderr, start_new_session=True,
                    preexec_fn=_die_with_parent if LIBC else None,
                ))  # fmt: skip
        _wait(processes, out, time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _die_with_parent() -> None:
    """In the child: a test run that is killed outright takes its ranks along (Linux's PR_SET_PDEATHSIG = 1)."""
    LIBC.prctl(1, signal.SIGKILL)


def _rank_env(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip


def _wait(processes: list[subprocess.Popen], out: Path, deadline: float, timeout: float) -> None:
    while True:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes):
            return
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            time.sleep(0.5)  # the first to fail is often the victim of another: let that one fail too
            failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
            raise WorkerError(
                "\n".join(f"rank {r} exited with {processes[r].poll()}:\n{_tail(out, r)}" for r in failed)
            )
        if time.monotonic() > deadline:
            late = [rank for rank, code in enumerate(codes) if code is None]
            logs = "\n".join(f"rank {r}:\n{_tail(out, r)}" for r in late)
            raise WorkerError(f"ranks {late} did not finish within {timeout} s\n{logs}")
        time.sleep(0.02)


def _tail(out: Path, rank: int, characters: int = 3000) -> str:
    return "".join((out / f"{stream}{rank}").read_text()[-characters:] for stream in ("stdout", "stderr"))


def _main(source: str, name: str, kwargs: str, out: str) -> None:
    """In the child: import the test file by path and call its function."""
    spec = importlib.util.spec_from_file_location("worker_module", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules["worker_module"] = module
    spec.loader.exec_module(module)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(1000 + rank)  # no test may pass because ranks happen to share a random state
    result = getattr(module, name)(rank, world_size, **json.loads(kwargs))
    torch.save(result, Path(out) / f"result{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
