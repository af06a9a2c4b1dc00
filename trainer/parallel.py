"""How one program runs on one or many processes: process state, sharding, precision, reductions.

Accelerate holds the process state, the device, the seeds and the trackers. It has no FSDP2 on the CPU and its
`prepare` couples model and optimizer, so the model is sharded here with torch's own `fully_shard`, alike on CUDA with
NCCL and on the CPU with gloo, and is never given to `prepare`.
"""

import gc
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from common import UserError
from optim.matrix import local
from trainer.language_model import LanguageModel, ModelConfig, model_class
from trainer.mesh import ParallelConfig, build_mesh, check_parallel, keep_freed_memory, start_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def setup(config: ParallelConfig, *, dtype: str = "float32", seed: int = 0) -> "Parallel":
    """Start the process group and the mesh. The one Accelerator of the run is `.accelerator` of the result.

    dtype: of the computation, float32, bfloat16 (with float32 weights) or float64 (of all, for proofs).
    Raises ValueError for a setting that cannot work, and where this process is alone although WORLD_SIZE > 1.
    """
    from accelerate.utils import set_seed

    mode = check_parallel(config)
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS is none
    accelerator = start_processes(timedelta(minutes=config.timeout_minutes))
    set_seed(seed)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    else:
        keep_freed_memory()
    # Of an earlier job in this process too: float32 is what a float32 run computes in.
    torch.set_float32_matmul_precision("high" if dtype == "bfloat16" else "highest")
    mesh = build_mesh(config, mode, accelerator.device.type, accelerator.num_processes)
    return Parallel(config, mode, accelerator, mesh, getattr(torch, dtype), seed)


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
    accelerator: "Accelerator"
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

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same plain weights and gradients (DDP)."""
        return dist.group.WORLD if self.mode == "ddp" else None

    @property
    def replicate_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same part of the weights (DDP, HSDP); None where each part is held once."""
        return self.mesh["replicate"].get_group() if self.mesh is not None and self.mode == "hsdp" else self.replicas

    # --- the model ---

    def wrap(self, config: ModelConfig, vocab_size: int, seq_len: int, document_start: int | None = None) -> nn.Module:
        """Build the model on the meta device, arrange it over the ranks, and initialise it from (seed, parameter name).

        Parameter names are the bare model's in every mode, up to DDP's prefix; see `unwrap`.
        """
        with torch.device("meta"):
            model = model_class(config._target_)(config, vocab_size, seq_len, document_start)
        model.to(torch.float64 if self.dtype == torch.float64 else torch.float32)
        self._parallelize(model)
        model.to_empty(device=self.device)
        initialise(model, self.seed)
        if self.mode == "ddp":
            device_ids = [self.device] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
        return model

    def _parallelize(self, model: LanguageModel) -> None:
        """The order matters: recomputation lies inside what is compiled, and the gathers of FSDP lie outside of it."""
        if self.config.activation_checkpointing != "none":
            model.recompute = self.config.activation_checkpointing
        if self.device.type == "cuda" if self.config.compile is None else self.config.compile:
            _compile(model)
        if self.mesh is not None:
            self._shard(model)

    def _shard(self, model: LanguageModel) -> None:
        mixed = self.dtype == torch.bfloat16
        low: dict[str, Any] = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else {}
        for block in model.blocks:
            # A block's input has the root's dtype already; what comes beside it, such as angles, keeps its own.
            fully_shard(block, mesh=self.mesh, mp_policy=MixedPrecisionPolicy(**low, cast_forward_inputs=False))
        # Embedding, head and final norm stay together in the root, so that a tied head needs no second gather.
        output: dict[str, Any] = dict(output_dtype=torch.float32) if mixed else {}
        fully_shard(model, mesh=self.mesh, mp_policy=MixedPrecisionPolicy(**low, **output))

    @contextmanager
    def accumulate(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of one micro-batch: gradients travel after the last one only.

        They are averaged over the ranks, so each rank divides its loss by its own share of the tokens."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last)
            if not last:  # gradients lie whole until the last one anyway: weights too, gathered once for all
                model.set_reshard_after_forward(False)
        kept = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
        with kept, self._precision(model):
            yield

    @contextmanager
    def evaluation(self, model: nn.Module) -> Iterator[None]:
        """Around forward passes without gradients; afterwards every parameter is a shard again."""
        model.eval()
        try:
            with torch.no_grad(), self._precision(model):
                yield
        finally:
            model.train()
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    @contextmanager
    def _precision(self, model: nn.Module) -> Iterator[None]:
        """Without FSDP, do as its policy does: modules read bfloat16 casts of their parameters, in recomputation too.

        An instance's attribute hides the parameter of its name, which ``named_parameters`` still finds."""
        if self.mesh is not None or self.dtype != torch.bfloat16:
            yield
            return
        casts = {parameter: parameter.to(torch.bfloat16) for parameter in model.parameters()}
        own = [(vars(m), name, p) for m in model.modules() for name, p in m.named_parameters(recurse=False)]
        try:
            for attributes, name, parameter in own:
                attributes[name] = casts[parameter]
            yield
        finally:
            for attributes, name, _ in own:
                attributes.pop(name, None)

    def clip(self, model: nn.Module, max_norm: float | None = None, loss_scale: int = 1) -> Tensor:
        """The 2-norm of the whole gradient (a scalar on the device, the same on all ranks, no host synchronisation).

        Where max_norm is given, scale the gradients so that their norm does not exceed it. Both norms are those of the
        mean loss, of which the gradients are loss_scale times."""
        grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.mesh is not None:
            square = norm.square()
            dist.all_reduce(square, group=self.shard_group)
            norm = square.sqrt()
        if loss_scale != 1:
            norm = norm / loss_scale
        if max_norm is not None:
            # As torch.nn.utils.clip_grads_with_norm_, which takes parameters, does it: one kernel for all shards.
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    # --- between ranks ---

    def sum(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, reduction="sum")

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def gather(self, compute: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
        """What compute() returns on each rank, on every rank. It must be picklable.

        Raises on every rank what the first rank that failed has raised, an OSError as a UserError."""
        try:
            outcomes: list[Any] = [(compute(), None)]
        except Exception as error:
            outcomes = [(None, error)]
        if self.world_size > 1:
            outcomes *= self.world_size
            dist.all_gather_object(outcomes, outcomes[self.rank], group=group)
        for rank, (_, failure) in enumerate(outcomes):
            if isinstance(failure, OSError):
                where = failure.filename or f"rank {rank}"
                raise UserError(f"{where}: {failure.strerror or failure}; mend that") from failure
            if failure is not None:
                raise failure
        return [value for value, _ in outcomes]

    def broadcast_rank0(self, compute: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """What compute() returns on rank 0, on every rank; its errors are raised as by `gather`."""
        values: list[Any] = self.gather(lambda: compute() if self.is_main else None, group)
        return values[0]

    def once_a_node(self, work: Callable[[], None]) -> None:
        """Run work on one rank of every node while the others wait; its errors are raised as by `gather`."""
        self.gather(lambda: work() if self.local_rank == 0 else None)

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
def initialise(model: LanguageModel, seed: int) -> None:
    """Fill the parameters, shards or whole, one tensor at a time; each rank cuts its shard from the same values.

    No rank ever holds more than one whole tensor. (Random calls on shards would give every rank the same shard.)"""
    for name, parameter in model.named_parameters():
        value = model.init_parameter(name, seed).to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):  # src_data_rank=None: cut without sending, all ranks have the whole
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


def _compile(model: LanguageModel) -> None:
    torch._dynamo.reset()  # an earlier job's shapes in this process would make those of this one symbolic
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # by default blocks would go on uncompiled, with a warning
    torch._dynamo.config.optimize_ddp = False  # it would split every block's graph at DDP's buckets, for nothing
    for module in model.modules_to_compile():
        module.compile()


def unwrap(model: nn.Module) -> LanguageModel:
    """The model itself, whose `named_parameters()` have the same names in every mode."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(bare, LanguageModel)
    return bare
