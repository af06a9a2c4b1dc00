"""The processes of a run: whether they were started right, and which of them together hold one copy of the weights."""

import ctypes
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

LAUNCH = "start with torchrun --nproc-per-node N train.py … or accelerate launch, or unset WORLD_SIZE"
MODES = ("auto", "single", "ddp", "fsdp", "hsdp")
RECOMPUTED = ("full", "selective", "none")


@dataclass
class ParallelConfig:
    """The section `parallel`."""

    mode: str = "auto"  # auto: single on one process, fsdp on several
    shard_size: int | None = None  # hsdp: ranks that share one copy of the weights; null: those of a node
    compile: bool | None = None  # torch.compile of every block and of the loss; null: on CUDA only
    activation_checkpointing: str = "none"  # full | selective | none: what of a block its backward pass recomputes
    deterministic: bool = False  # sums in one order, slower on CUDA; an operation that has none is an error
    timeout_minutes: int = 30  # of a collective: the first step compiles and reads data at each rank's own pace

    def __post_init__(self) -> None:
        earlier = {"true": "full", "false": "none"}  # what the setting's values were
        how = str(self.activation_checkpointing)
        self.activation_checkpointing = earlier.get(how.lower(), how)


def check_launched() -> None:
    """Raise UserError where several processes are announced, but not how they find each other."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    for key in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if world_size > 1 and key not in os.environ:
            raise UserError(f"WORLD_SIZE={world_size} but {key} is not set: {LAUNCH}")


def check_parallel(config: ParallelConfig, world_size: int | None = None) -> str:
    """Return the mode to run; start nothing. Raise ValueError, in one line, where the setting cannot work here.

    world_size: of the job, by default as torchrun or accelerate launch set it.
    """
    launched = world_size is not None or "LOCAL_RANK" in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1
    world_size = world_size or int(os.environ.get("WORLD_SIZE", 1))
    if config.mode not in MODES:
        raise ValueError(f"parallel.mode={config.mode} is unknown: choose one of {', '.join(MODES)}")
    if (how := config.activation_checkpointing) not in RECOMPUTED:
        raise ValueError(f"parallel.activation_checkpointing={how} is unknown: choose one of {', '.join(RECOMPUTED)}")
    mode = config.mode if config.mode != "auto" else "single" if world_size == 1 else "fsdp"
    if mode == "single" and world_size > 1:
        raise ValueError(
            f"parallel.mode=single but {world_size} processes were started: choose ddp, fsdp or hsdp, or start one"
        )
    if mode in ("ddp", "fsdp") and not launched:
        raise ValueError(
            f"parallel.mode={mode} needs a launcher: torchrun --nproc-per-node N train.py … "
            "(or parallel=single for one process)"
        )
    if mode == "hsdp":
        shard_group_size(config, world_size)
    elif config.shard_size is not None:
        raise ValueError(f"parallel.shard_size={config.shard_size} has a meaning for parallel.mode=hsdp only: unset it")
    return mode


def shard_group_size(config: ParallelConfig, world_size: int) -> int:
    """Ranks in an HSDP shard group: the setting, or one node's ranks, or on one node the largest proper divisor."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
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


def start_processes(timeout: timedelta) -> "Accelerator":
    """Accelerate's process state, which must find as many processes as the launcher announced."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    check_launched()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    on_cpu = not torch.cuda.is_available()
    if on_cpu and world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
        os.environ["OMP_NUM_THREADS"] = str(threads)  # or Accelerate counts the cores its own way
        torch.set_num_threads(threads)
    # Without cpu=True every rank on a CPU would believe that it is alone. `accelerate launch` hands on what is in the
    # user's own file: a mixed_precision, and DeepSpeed, Megatron and the like, to none of which the model is given.
    for key in [key for key in os.environ if key.startswith("ACCELERATE_USE_") and key != "ACCELERATE_USE_CPU"]:
        del os.environ[key]
    handlers = [InitProcessGroupKwargs(timeout=timeout)]
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
    if (found := accelerator.num_processes) != world_size:
        raise ValueError(f"WORLD_SIZE={world_size} but Accelerate found {found} processes: {LAUNCH}")
    return accelerator


def build_mesh(config: ParallelConfig, mode: str, device: str, ranks: int) -> DeviceMesh | None:
    """The ranks as (shard,) for fsdp, (replicate, shard) for hsdp; None where each rank holds all weights."""
    if mode == "fsdp":
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    if mode == "hsdp":
        size = shard_group_size(config, ranks)
        return init_device_mesh(device, (ranks // size, size), mesh_dim_names=("replicate", "shard"))
    return None


def use_expandable_segments() -> None:
    """Let CUDA's allocator extend its segments, so that other sizes (of an evaluation, a halved micro-batch, a job of a
    sweep) find room where earlier ones lay; before CUDA starts, and unless the user has set the allocator up."""
    if torch.cuda.is_available() and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def keep_freed_memory() -> None:
    """Let glibc keep what tensors on the CPU leave behind, for the next step's, up to 1 GiB a tensor.

    By default it returns large blocks to the kernel, which hands them back page by page, zeroed, at every step."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: below it, memory comes from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def nearest(value: int, unit: int) -> str:
    """The multiples of ``unit`` around ``value``, for a message."""
    below = value // unit * unit
    return f"nearest {below} or {below + unit}" if below else f"nearest {unit}"


def device_memory() -> int | None:
    """Bytes of a GPU, of which all are taken to have as many; None where there is none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
