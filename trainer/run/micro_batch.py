"""How many sequences a pass has room for: tried in the warm-up, halved on every rank where one runs out of memory."""

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from common import UserError
from data import Loader
from trainer.config import TrainConfig
from trainer.mesh import divisors
from trainer.parallel import Parallel
from trainer.run.checkpoint import Progress

Batch = tuple[Tensor, Tensor]


def with_room(model: nn.Module, parallel: Parallel, batches: Sequence[Batch], beside: int) -> Batch:
    """The first of an update's batches, or its first half, or quarter, …: what a pass has room for on every rank,
    beside so many bytes more.

    FSDP may keep gradients of it, until the next pass."""
    batch, whole = batches[0], len(batches) == 1
    if not can_run_out(parallel.device):
        return batch
    size = min(parallel.gather(lambda: len(batch[0])))

    def without_room() -> bool:
        passes = 1 if whole and size == len(batch[0]) else 2
        return runs_out(model, parallel, [part[:size] for part in batch], beside, passes)

    while any(parallel.gather(without_room)):
        if size == 1:
            raise UserError(f"train.micro_batch=1: {parallel.device} has no room for a sequence of train.seq_len="
                            f"{batch[0].shape[1]} tokens: give parallel.activation_checkpointing=full, more ranks "
                            "under parallel=fsdp, or a smaller model")  # fmt: skip
        size = divisors(size)[-2]  # the half of an even one
        torch._dynamo.reset()  # what is compiled for one size would become symbolic at the next
        if parallel.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(parallel.device)
    return batch[0][:size], batch[1][:size]


def can_run_out(device: torch.device) -> bool:
    """Whether an allocation raises OutOfMemoryError; a CPU's rather ends the process."""
    return device.type == "cuda"


def runs_out(model: nn.Module, parallel: Parallel, batch: list[Tensor], beside: int, passes: int = 1) -> bool:
    """Whether this rank has no room for a forward and backward pass, or for the second of an update, which begins
    beside the first one's gradients.

    No rank waits for another in a pass, so that each may fail alone.  FSDP's weights and gradients therefore lie whole
    in it, as in an update of several passes.  One of a single pass needs less, by the weights of most blocks: it may be
    halved although it had room.  That costs no more work, and the pass after the trial, in which a rank that fails
    leaves the others waiting, never needs more than was tried.

    Raises:
        UserError: this version of torch cannot go on after a pass under FSDP that has failed.
    """
    if isinstance(model, FSDPModule):
        for module in fsdp_modules(model):
            module.unshard()
    try:
        _held = torch.empty(beside, dtype=torch.uint8, device=parallel.device)
        for _ in range(passes):
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


def use_micro_batch(
    fits: int, train: TrainConfig, loader: Loader, progress: Progress, say: Callable[[str], None]
) -> None:
    """From now on, in evaluations and after a resume too; says so where it is less than was asked for."""
    asked, progress.micro_batch = loader.micro_batch, fits
    if fits < asked:
        train.micro_batch = fits
        loader.set_micro_batch(fits)
        say(f"train.micro_batch={asked} does not fit into the memory of {loader.device}: {fits} from now on")
