"""Which arrangement a setting and a number of processes mean, and who may start them."""

import os
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher import api

from tests.errors import raises_naming
from tests.runs import ROOT
from trainer.launch import processes
from trainer.parallel import ParallelConfig, check_parallel, setup


@pytest.mark.parametrize(
    ("setting", "world_size", "local_world_size", "mode"),
    [
        (dict(), 1, 1, "single"),
        (dict(), 3, 3, "fsdp"),
        (dict(mode="ddp"), 1, 1, "ddp"),
        (dict(mode="hsdp"), 4, 4, "hsdp"),
        (dict(mode="hsdp", shard_size=3), 6, 6, "hsdp"),
    ],
)
def test_mode(setting, world_size, local_world_size, mode, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world_size))
    assert check_parallel(ParallelConfig(**setting), world_size) == mode


@pytest.mark.parametrize(
    ("setting", "world_size", "words"),
    [
        (dict(mode="fsdp2"), 2, ["parallel.mode=fsdp2", "auto, single, ddp, fsdp, hsdp"]),
        (dict(mode="single"), 2, ["parallel.mode=single", "2 processes", "ddp, fsdp or hsdp"]),
        (dict(mode="fsdp"), None, ["parallel.mode=fsdp", "torchrun --nproc-per-node N train.py"]),
        (dict(mode="ddp"), None, ["parallel.mode=ddp", "torchrun"]),
        (dict(mode="hsdp"), None, ["parallel.mode=hsdp", "factors", "not 1"]),
        (dict(mode="hsdp"), 3, ["parallel.mode=hsdp", "factors", "not 3"]),
        (dict(mode="hsdp", shard_size=4), 6, ["parallel.shard_size=4", "6 processes", "2, 3"]),
        (dict(mode="hsdp", shard_size=6), 6, ["parallel.shard_size=6", "6 processes", "2, 3"]),
        (dict(mode="fsdp", shard_size=2), 4, ["parallel.shard_size=2", "parallel.mode=hsdp"]),
    ],
)
def test_impossible_settings_are_one_clear_line(setting, world_size, words, monkeypatch):
    for key in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    with raises_naming(ValueError, *words):
        check_parallel(ParallelConfig(**setting), world_size)


def test_a_process_that_is_alone_among_many_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for key in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    with raises_naming(ValueError, "WORLD_SIZE=4", "RANK", "torchrun"):
        setup(ParallelConfig(mode="fsdp"))


@pytest.mark.parametrize("plugin", ["DEEPSPEED", "MEGATRON_LM", "FSDP"])
def test_what_a_user_s_accelerate_file_asks_for_is_left_out(monkeypatch, plugin):
    """The first two need packages that are not here."""
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    assert setup(ParallelConfig()).mode == "single" and f"ACCELERATE_USE_{plugin}" not in os.environ


def test_deterministic_is_of_the_run_alone(monkeypatch):
    """The next job of a sweep, in the same process, does not inherit it."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        setup(ParallelConfig(deterministic=True))
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        setup(ParallelConfig())
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("known", [True, False])
def test_processes_start_under_a_torch_without_a_patience_of_its_own(configure, monkeypatch, known):
    """torch 2.11's LaunchConfig has no shutdown_timeout."""
    names = ["min_nodes", "max_nodes", "nproc_per_node", "run_id", "rdzv_backend", "rdzv_endpoint", "local_addr"]
    config_class = make_dataclass("LaunchConfig", [*names, "max_restarts", *["shutdown_timeout"] * known])
    started = []
    monkeypatch.setattr(api, "LaunchConfig", config_class)
    monkeypatch.setattr(api, "elastic_launch", lambda settings, *_: lambda *words: started.append(settings))
    processes.launch(configure("experiment=smoke", "run.processes=3", world_size=3), ["experiment=smoke"])
    assert started[0].nproc_per_node == 3 and hasattr(started[0], "shutdown_timeout") == known


# --- launchers ---

SCRIPT = """
import os
import torch
from trainer.parallel import ParallelConfig, setup, teardown

def main():
    parallel = setup(ParallelConfig())
    total = parallel.sum(torch.ones(()))
    line = f"rank {parallel.rank} of {parallel.world_size} {parallel.mode} {int(total)}\\n"
    os.write(1, line.encode())  # at once: print writes the newline apart, and the ranks share a pipe

main()
teardown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_both_launchers_start_the_same_processes(launcher, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        # --multi_gpu is Accelerate's word for several processes; a CPU is then used where there is no GPU.
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                       "--mixed_precision", "bf16", "--dynamo_backend", "no", "--main_process_port", "0"],
    }[launcher]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", *command, str(Path(script))], env=env, capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"rank 0 of 2 fsdp 2", "rank 1 of 2 fsdp 2"} <= set(done.stdout.splitlines())
