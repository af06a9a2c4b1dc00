"""How one program runs on one or many processes: process state, sharding, precision, reductions.

Accelerate holds the process state, the device, the seeds and the trackers. It has no FSDP2 on the CPU and its
`prepare` couples model and optimizer, so the model is sharded here with torch's own `fully_shard`, alike on CUDA with
NCCL and on the CPU with gloo, and is never given to `prepare`.
"""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, set_seed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from common import UserError
from optim.matrix import local
from trainer.model import GPT, ModelConfig

MODES = ("auto", "single", "ddp", "fsdp", "hsdp")
DTYPES = ("auto", "float32", "bfloat16", "float64")


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


def setup(
    config: ParallelConfig, *, dtype: str = "auto", seed: int = 0, log_with: Any = None, project_dir: str | None = None
) -> "Parallel":
    """Start the process group and the mesh. The one Accelerator of the run is `.accelerator` of the result.

    dtype: of the computation, see DTYPES; auto is bfloat16 on CUDA and float32 on the CPU, weights float32 in both;
    float64 keeps everything in float64, for proofs. log_with, project_dir: as Accelerator takes them.
    Raises ValueError for a setting that cannot work, and where this process is alone although WORLD_SIZE > 1.
    """
    if dtype not in DTYPES:
        raise ValueError(f"train.dtype={dtype} is unknown: choose one of {', '.join(DTYPES)}")
    timeout = InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes))
    mode = check_parallel(config)
    accelerator = start_processes(kwargs_handlers=[timeout], log_with=log_with, project_dir=project_dir)
    set_seed(seed)
    on_cuda = accelerator.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    else:
        keep_freed_memory()
    if dtype == "auto":
        dtype = "bfloat16" if on_cuda else "float32"
    if dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")
    return Parallel(config, mode, accelerator, build_mesh(config, mode, accelerator), getattr(torch, dtype), seed)


def keep_freed_memory() -> None:
    """Let glibc keep what tensors on the CPU leave behind, for the next step's, up to 1 GiB a tensor.

    By default it returns large blocks to the kernel, which hands them back page by page, zeroed, at every step."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: below it, memory comes from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def start_processes(**kwargs: Any) -> Accelerator:
    """Accelerate's process state, which must find as many processes as the launcher announced."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    missing = [key for key in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    mend = "start with torchrun or accelerate launch, or unset WORLD_SIZE"
    if world_size > 1 and missing:
        raise ValueError(f"WORLD_SIZE={world_size} but only this process was found ({missing[0]} is not set): {mend}")
    on_cpu = not torch.cuda.is_available()
    if on_cpu and world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
        os.environ["OMP_NUM_THREADS"] = str(threads)  # or Accelerate counts the cores its own way
        torch.set_num_threads(threads)
    # Without cpu=True every rank on a CPU would believe that it is alone. mixed_precision is set because
    # `accelerate launch` would otherwise take it from the user's own file.
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", **kwargs)
    if accelerator.num_processes != world_size:
        raise ValueError(
            f"WORLD_SIZE={world_size} but Accelerate found {accelerator.num_processes} process(es): {mend}"
        )
    return accelerator


def build_mesh(config: ParallelConfig, mode: str, accelerator: Accelerator) -> DeviceMesh | None:
    """The ranks as (shard,) for fsdp, (replicate, shard) for hsdp; None where each rank holds all weights."""
    device, ranks = accelerator.device.type, accelerator.num_processes
    if mode == "fsdp":
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    if mode == "hsdp":
        size = shard_group_size(config, ranks)
        return init_device_mesh(device, (ranks // size, size), mesh_dim_names=("replicate", "shard"))
    return None


def teardown() -> None:
    """Destroy the process group, if there is one, before the interpreter ends.

    A gloo thread that lets go of its last tensor while Python ends aborts the process. Collecting garbage destroys
    the group's threads where nothing holds it (DTensor's caches may), and gives them time where something does."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


@dataclass
class Parallel:
    """What the trainer asks of the processes it runs on. Collectives are called by all ranks alike."""

    config: ParallelConfig
    mode: str  # single | ddp | fsdp | hsdp
    accelerator: Accelerator
    mesh: DeviceMesh | None  # (replicate, shard) for hsdp, (shard,) for fsdp
    dtype: torch.dtype  # of the computation
    seed: int
    rank: int = field(init=False)
    local_rank: int = field(init=False)
    world_size: int = field(init=False)
    device: torch.device = field(init=False)

    def __post_init__(self):
        self.rank, self.local_rank = self.accelerator.process_index, self.accelerator.local_process_index
        self.world_size, self.device = self.accelerator.num_processes, self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks that together hold one copy of the weights; None where each rank holds its own."""
        return None if self.mesh is None else self.mesh["shard"].get_group()

    # --- the model ---

    def wrap(
        self, config: ModelConfig, vocab_size: int, seq_len: int, document_start: int | None = None
    ) -> nn.Module:
        """Build a GPT on the meta device, arrange it over the ranks, and initialise it from (seed, parameter name).

        Parameter names are the bare model's in every mode, up to DDP's prefix; see `unwrap`.
        """
        with torch.device("meta"):
            model = GPT(config, vocab_size, seq_len, document_start)
        model.to(torch.float64 if self.dtype == torch.float64 else torch.float32)
        # The order matters: recomputation lies inside what is compiled, and the gathers of FSDP lie outside of it.
        if self.config.activation_checkpointing:
            for block in model.blocks:
                block.recompute = True
        compile_it = self.config.compile if self.config.compile is not None else self.device.type == "cuda"
        if compile_it:
            for block in model.blocks:
                block.compile()
            model.chunk_loss = torch.compile(model.chunk_loss)
        if self.mesh is not None:
            self._shard(model)
        elif self.dtype == torch.bfloat16:
            model.forward = torch.autocast(self.device.type, torch.bfloat16)(model.forward)
        model.to_empty(device=self.device)
        initialise(model, self.seed)
        if self.mode == "ddp":
            device_ids = [self.device] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
        return model

    def _shard(self, model: GPT) -> None:
        mixed = self.dtype == torch.bfloat16
        low = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else {}
        for block in model.blocks:
            fully_shard(block, mesh=self.mesh, mp_policy=MixedPrecisionPolicy(**low))
        # Embedding, head and final norm stay together in the root, so that a tied head needs no second gather.
        output = dict(output_dtype=torch.float32) if mixed else {}
        fully_shard(model, mesh=self.mesh, mp_policy=MixedPrecisionPolicy(**low, **output))

    @contextmanager
    def accumulate(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of one micro-batch: gradients travel after the last one only.

        They are averaged over the ranks, so each rank divides its loss by its own share of the tokens."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        hold_back = isinstance(model, DistributedDataParallel) and not last
        with model.no_sync() if hold_back else nullcontext():
            yield

    @contextmanager
    def evaluation(self, model: nn.Module) -> Iterator[None]:
        """Around forward passes without gradients; afterwards every parameter is a shard again."""
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            model.train()
            if isinstance(model, FSDPModule):
                model.reshard()

    def clip(self, model: nn.Module, max_norm: float | None = None) -> Tensor:
        """The 2-norm of the whole gradient (a scalar on the device, the same on all ranks, no host synchronisation).

        Where max_norm is given, scale the gradients so that their norm does not exceed it."""
        grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.mesh is not None:
            square = norm.square()
            dist.all_reduce(square, group=self.shard_group)
            norm = square.sqrt()
        if max_norm is not None:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    # --- between ranks ---

    def sum(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, reduction="sum")

    def mean(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, reduction="mean")

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def once_a_node(self, work: Callable[[], None]) -> None:
        """Run work on one rank of every node while the others wait; its UserError is raised on all ranks."""
        said = ""
        if self.local_rank == 0:
            try:
                work()
            except UserError as error:
                said = str(error)
        if told := next(filter(None, gather_object([said])), ""):
            raise UserError(told)

    def broadcast_rank0(self, compute: Callable[[], Any]) -> Any:
        """Rank 0's value, or its UserError, on every rank."""
        said = None
        if self.is_main:
            try:
                said = compute(), None
            except UserError as error:
                said = None, error
            except OSError as error:
                said = None, UserError(f"the run cannot go on: {error}")
        value, error = broadcast_object_list([said])[0]
        if error is not None:
            raise error
        return value

    # --- the device ---

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given; nothing to do on the CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory_bytes(self) -> int:
        """This process' peak so far: allocated device memory on CUDA, resident memory on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def close(self) -> None:
        """Finish the trackers. The process group stays, for the next job of a sweep: one that was left cannot be
        joined again under the same keys. Whoever ends the process destroys it."""
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:  # a service that is gone does not make the run fail
                print(f"warning: {tracker.name} could not be closed: {error}", file=sys.stderr)


@torch.no_grad()
def initialise(model: GPT, seed: int) -> None:
    """Fill the parameters, shards or whole, one tensor at a time; each rank cuts its shard from the same values.

    No rank ever holds more than one whole tensor. (Random calls on shards would give every rank the same shard.)"""
    for name, parameter in model.named_parameters():
        value = model.init_parameter(name, seed).to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):  # src_data_rank=None: cut without sending, all ranks have the whole
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


def unwrap(model: nn.Module) -> GPT:
    """The GPT itself, whose `named_parameters()` have the same names in every mode."""
    return model.module if isinstance(model, DistributedDataParallel) else model
