"""One update and one evaluation that leave no trace: all kernels are compiled and loaded before the clock runs, and
the device has shown how many sequences it has room for."""

import gc
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from common import UserError
from data import Loader
from optim.combined import Combined
from optim.matrix import local
from trainer.config import TrainConfig
from trainer.mesh import divisors
from trainer.parallel import Parallel
from trainer.run.checkpoint import Progress

Batch = tuple[Tensor, Tensor]


def warm_up(model: nn.Module, optimizers: Combined, parallel: Parallel, batch: Batch) -> int:
    """On any batch of (inputs, targets) [B, T].  Ranks call together.

    Returns:
        Of how many of the B sequences a pass has room on every rank.  Elsewhere than on a GPU, B.

    Raises:
        UserError: there is no room for one.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    state = dry_run_step(optimizers, parallel.device)
    optimizers.zero_grad()
    batch = with_room(model, parallel, batch, state)
    with parallel.accumulate(model, last=True):
        model(*batch).backward()
    parallel.clip(model)
    optimizers.zero_grad()
    with parallel.evaluation(model):
        model(*batch)
    return len(batch[0])


def with_room(model: nn.Module, parallel: Parallel, batch: Batch, beside: int) -> Batch:
    """The batch, or its first half, or quarter, …: what a pass has room for on every rank, beside so many bytes more.

    FSDP may keep gradients of it, until the next pass."""
    if not can_run_out(parallel.device):
        return batch
    size = min(parallel.gather(lambda: len(batch[0])))
    while any(parallel.gather(partial(runs_out, model, parallel, [part[:size] for part in batch], beside))):
        if size == 1:
            raise UserError(f"train.micro_batch=1: {parallel.device} has no room for a sequence of train.seq_len="
                            f"{batch[0].shape[1]} tokens: give parallel.activation_checkpointing=true, more ranks "
                            "under parallel=fsdp, or a smaller model")  # fmt: skip
        size = divisors(size)[-2]  # the half of an even one
        torch._dynamo.reset()  # what is compiled for one size would become symbolic at the next
        if parallel.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(parallel.device)
    return batch[0][:size], batch[1][:size]


def can_run_out(device: torch.device) -> bool:
    """Whether an allocation raises OutOfMemoryError; a CPU's rather ends the process."""
    return device.type == "cuda"


def runs_out(model: nn.Module, parallel: Parallel, batch: list[Tensor], beside: int) -> bool:
    """Whether this rank has no room for a forward and backward pass.

    No rank waits for another in the pass, so that each may fail alone.  FSDP's weights and gradients lie whole in it,
    as they do where an update has several passes: where it has one, that is more than it will need.

    Raises:
        UserError: this version of torch cannot go on after a pass under FSDP that has failed.
    """
    if isinstance(model, FSDPModule):
        for module in fsdp_modules(model):
            module.unshard()
    try:
        _held = torch.empty(beside, dtype=torch.uint8, device=parallel.device)
        with parallel.accumulate(model, last=False):
            model(*batch).backward()
        failed = False
    except torch.OutOfMemoryError:
        failed = True
    if isinstance(model, FSDPModule):
        if failed and not hasattr(model, "reset_iter_state"):
            raise UserError(f"train.micro_batch={len(batch[0])} does not fit into the memory of {parallel.device}: "
                            "give less, or take torch 2.13, with which less is tried")  # fmt: skip
        if failed:
            model.reset_iter_state()
        for module in fsdp_modules(model):
            module.reshard()
            if module is not model:  # whose own weights are needed again at once
                module.set_reshard_after_forward(True, recurse=False)
    model.zero_grad()
    gc.collect()  # the frames in which it failed
    if parallel.device.type == "cuda":
        torch.cuda.empty_cache()
    return failed


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def use_micro_batch(fits: int, train: TrainConfig, loader: Loader, progress: Progress) -> list[str]:
    """From now on, in evaluations and after a resume too; says so where it is less than was asked for."""
    asked, progress.micro_batch = loader.micro_batch, fits
    if fits == asked:
        return []
    train.micro_batch = fits
    loader.set_micro_batch(fits)
    return [f"train.micro_batch={asked} does not fit into the memory of {loader.device}: {fits} from now on"]


@torch.no_grad()
def dry_run_step(optimizers: Combined, device: torch.device) -> int:
    """Step every optimizer with zero gradients, then put back weights, state, counters and random numbers, bit for bit.

    A copy is kept of one role's weights and state at a time.  Parameters without a gradient are not stepped.
    Returns the bytes of the state that has begun in it, and will again.
    """
    begun = 0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for member in optimizers.members.values():
            params = [p for group in member.param_groups for p in group["params"] if p.grad is not None]
            for param in params:
                local(param.grad).zero_()
            groups = [{k: v for k, v in group.items() if k != "params"} for group in member.param_groups]
            states = {param: dict(member.state[param]) for param in params if param in member.state}
            tensors = params + [v for state in states.values() for v in state.values() if isinstance(v, Tensor)]
            kept = [local(tensor).clone() for tensor in tensors]
            member.step()
            begun += bytes_of(member.state[param] for param in params) - bytes_of(states.values())
            for tensor, before in zip(tensors, kept, strict=True):
                local(tensor).copy_(before)
            for group, settings in zip(member.param_groups, groups, strict=True):
                group.update(settings)
            for param in params:
                member.state.pop(param, None)
            member.state.update(states)
    return begun


def bytes_of(states: Iterable[dict[str, Any]]) -> int:
    return sum(local(value).nbytes for state in states for value in state.values() if isinstance(value, Tensor))
