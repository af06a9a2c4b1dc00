"""Ranks and their devices: which ranks together hold one copy of the weights, and a device's memory."""

import ctypes
import os
import resource
import sys
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

MODES = ("auto", "single", "ddp", "fsdp", "hsdp")


@dataclass
class ParallelConfig:
    """The section `parallel`."""

    mode: str = "auto"  # auto: single on one process, fsdp on several
    shard_size: int | None = None  # hsdp: ranks that share one copy of the weights; null: those of a node
    compile: bool | None = None  # torch.compile of every block and of the loss; null: on CUDA only
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more work
    timeout_minutes: int = 30  # of a collective: the first step compiles and reads data at each rank's own pace


def check_parallel(config: ParallelConfig, world_size: int | None = None, local_world_size: int | None = None) -> str:
    """Return the mode to run; start nothing. Raise ValueError, in one line, where the setting cannot work here.

    world_size, local_world_size: ranks in all and on this node, by default as torchrun or accelerate launch set them.
    """
    launched = world_size is not None or "LOCAL_RANK" in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1
    world_size = world_size or int(os.environ.get("WORLD_SIZE", 1))
    if config.mode not in MODES:
        raise ValueError(f"parallel.mode={config.mode} is unknown: choose one of {', '.join(MODES)}")
    mode = config.mode
    if mode == "auto":
        mode = "single" if world_size == 1 else "fsdp"
    if mode == "single" and world_size > 1:
        raise ValueError(
            f"parallel.mode=single but {world_size} processes were started: "
            "choose ddp, fsdp or hsdp, or start one process"
        )
    if mode in ("ddp", "fsdp") and not launched:
        raise ValueError(
            f"parallel.mode={mode} needs a launcher: torchrun --nproc-per-node N train.py … "
            "(or parallel=single for one process)"
        )
    if mode == "hsdp":
        shard_group_size(config, world_size, local_world_size)
    elif config.shard_size is not None:
        raise ValueError(f"parallel.shard_size={config.shard_size} has a meaning for parallel.mode=hsdp only: unset it")
    return mode


def shard_group_size(config: ParallelConfig, world_size: int, local_world_size: int | None = None) -> int:
    """Ranks in an HSDP shard group: the setting, or one node's ranks, or on one node the largest proper divisor."""
    local = local_world_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    proper = [s for s in range(2, world_size) if world_size % s == 0]
    if not proper:
        raise ValueError(
            f"parallel.mode=hsdp needs a number of processes that factors, not {world_size}: "
            "choose parallel=fsdp, or start 4, 6, 8, … processes"
        )
    if config.shard_size is None:
        return local if local < world_size and local in proper else proper[-1]
    if config.shard_size not in proper:
        raise ValueError(
            f"parallel.shard_size={config.shard_size} must be a proper divisor of the {world_size} "
            f"processes: choose one of {', '.join(map(str, proper))}"
        )
    return config.shard_size


def build_mesh(config: ParallelConfig, mode: str, device: str, ranks: int) -> DeviceMesh | None:
    """The ranks as (shard,) for fsdp, (replicate, shard) for hsdp; None where each rank holds all weights."""
    if mode == "fsdp":
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    if mode == "hsdp":
        size = shard_group_size(config, ranks)
        return init_device_mesh(device, (ranks // size, size), mesh_dim_names=("replicate", "shard"))
    return None


def keep_freed_memory() -> None:
    """Let glibc keep what tensors on the CPU leave behind, for the next step's, up to 1 GiB a tensor.

    By default it returns large blocks to the kernel, which hands them back page by page, zeroed, at every step."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: below it, memory comes from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def peak_memory_bytes(device: torch.device) -> int:
    """This process' peak so far: allocated device memory on CUDA, resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
