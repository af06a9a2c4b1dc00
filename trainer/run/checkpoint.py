"""Checkpoints: everything a run needs to go on as if it had not been interrupted, on any number of ranks.

Tensors go through torch's distributed checkpoint (DCP), each under its parameter's name, so that what one sharding
wrote any other can read.  The names are those that DCP gives to {"model": get_model_state_dict(...), "optim":
get_optimizer_state_dict(...)}, so that programs that know nothing of this one can load them:

    model.<parameter>                   weights
    lookahead., average.<parameter>     means of the weights or of their changes
    optim.state.<parameter>.<key>       optimizer state; of replicated whole matrices, each owner writes its own
    optim.param_groups                  settings, for such programs only
    rng.<rank>.<device>                 random state of a rank

Everything else is numbers and stands in state.json.  Nothing from the disk is unpickled: DCP loads tensors with
``weights_only``, and ``dcp_index.py`` reads DCP's index.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from common import write_json
from data import TrainValSplit
from optim.base import COUNTERS
from optim.combined import Combined
from optim.named_state import init_state, load_named, named_groups, named_numbers, named_tensors
from trainer.config import Config
from trainer.parallel import Parallel, unwrap
from trainer.run import storage
from trainer.run.dcp_index import load_tensors, one_line, read_index, write_index
from trainer.run.directory import settings
from trainer.run.storage import INDEX, STATE, CheckpointError


@dataclass
class Progress:
    """Where a run stands, beside its tensors."""

    step: int = 0  # updates done
    seconds: float = 0.0  # of training
    val_loss: float | None = None  # the latest
    val_step: int | None = None  # where it was measured
    best_val_loss: float | None = None
    skipped: int = 0  # updates in a row, up to this step, that were not finite and not applied
    branch: str | None = None  # RUN@STEP that it has gone on from
    micro_batch: int | None = None  # what there was room for, of the train.micro_batch that was asked for

    def note_val_loss(self, loss: float) -> None:
        self.val_loss, self.val_step = loss, self.step
        if math.isfinite(loss):
            self.best_val_loss = loss if self.best_val_loss is None else min(loss, self.best_val_loss)


class Checkpoints:
    """Saves and loads the state of one run.  All ranks call alike; only :meth:`poll` may differ in time.

    Args:
        config: ``run.dir`` and the section ``checkpoint``; all of it goes into state.json, for whoever resumes.
        weights: name -> live tensor of what else is laid out like the weights, such as their average.
        split: the data that the run reads.
        before_commit: called in the background, on rank 0.
    """

    def __init__(
        self,
        config: Config,
        parallel: Parallel,
        model: nn.Module,
        optimizers: Combined,
        weights: dict[str, Tensor],
        split: TrainValSplit,
        before_commit: Callable[[], None],
    ):
        self.folder, self.keep = config.run.checkpoints, config.checkpoint
        self.parallel, self.model, self.optimizers = parallel, unwrap(model), optimizers
        self.before_commit, self.weights = before_commit, weights
        self.about = {
            "world_size": parallel.world_size,
            "mode": parallel.mode,
            "vocab_size": self.model.vocab_size,
            "config": settings(config),
            "tokenizer": split.tokenizer,
            "shards": split.fingerprint,
        }
        self.group = None
        if parallel.world_size > 1:  # its own: DCP talks in the background, while training does
            timeout = timedelta(minutes=parallel.config.timeout_minutes)
            self.group = dist.new_group(backend="gloo", timeout=timeout)
        on_gpu = parallel.device.type == "cuda"
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
            )
        )
        on_device = partial(torch.cuda.set_device, parallel.device) if on_gpu else None  # a thread's is GPU 0 at first
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=on_device)
        self.writing: Future | None = None
        self.latest: int | None = None  # step of the newest checkpoint that this process has saved or loaded

    # Saving --------------------------------------------------------------------------------------------------

    def save(self, progress: Progress) -> None:
        """Copy the state; the background writes the copy.  ``poll`` the save before first."""
        with self.optimizers.averaged():
            tensors = self.stager.stage({**self.tensors(), "optim.param_groups": named_groups(self.optimizers)})
        assert isinstance(tensors, dict)  # a Future only where staging is asynchronous too
        state = {**asdict(progress), "numbers": named_numbers(self.optimizers), **self.about}
        self.writing = self.pool.submit(self._write, tensors, state, progress.step)

    def wait(self) -> None:
        """Until the background has written what it was given; says nothing about success."""
        if self.writing is not None:
            self.writing.exception()

    def poll(self, wait: bool = False) -> str | None:
        """Take note of a save that has ended: ``latest`` is its step.  If it failed: why, told once."""
        if wait:
            self.wait()
        if self.writing is None or not self.writing.done():
            return None
        done, self.writing = self.writing, None
        if error := done.exception():
            return one_line(error)
        self.latest = storage.step_of(done.result())
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, live or cut from one, of all that this rank holds.  On all ranks."""
        model = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        optim = {f"optim.{name}": tensor for name, tensor in named_tensors(self.optimizers).items()}
        rng = {f"rng.{self.parallel.rank}.cpu": torch.get_rng_state()}
        if self.parallel.device.type == "cuda":
            rng[f"rng.{self.parallel.rank}.cuda"] = torch.cuda.get_rng_state(self.parallel.device)
        return model | optim | rng | self.weights

    def _write(self, tensors: dict[str, Tensor], state: dict[str, Any], step: int) -> Path:
        """In the background: DCP's files, then each rank hashes its own, then rank 0 commits."""
        folder = storage.folder_of(self.folder, step)
        partial = storage.partial_of(folder)
        try:
            self.parallel.broadcast_rank0(lambda: storage.make_partial(partial), self.group)
            writer = dcp.FileSystemWriter(partial)
            index = dcp.save(tensors, storage_writer=writer, process_group=self.group)
            self.parallel.broadcast_rank0(lambda: write_index(partial, index), self.group)
            self.parallel.broadcast_rank0(lambda: write_json(partial / STATE, state), self.group)
            names = [path.name for path in partial.glob(f"__{self.parallel.rank}_*")]
            names += [".metadata", INDEX, STATE] if self.parallel.is_main else []
            parts = self.parallel.gather(
                lambda: {name: storage.fingerprint(partial / name) for name in names}, self.group
            )
            files = {name: found for part in parts for name, found in part.items()}
            self.parallel.broadcast_rank0(self.before_commit, self.group)
            self.parallel.broadcast_rank0(lambda: storage.commit(folder, files), self.group)
        except BaseException:
            if self.parallel.is_main:
                storage.remove_partial(self.folder)
            raise
        if self.parallel.is_main:
            with suppress(Exception):  # an old one too many harms nobody
                storage.prune(self.folder, self.keep.keep_last, self.keep.keep_best)
        return folder

    # Loading -------------------------------------------------------------------------------------------------

    def load(self, folder: Path) -> Progress:
        """Load a verified checkpoint in place, whatever ranks and sharding wrote it.

        Raises CheckpointError: it does not hold exactly what this model and these optimizers need.
        """
        state, metadata = storage.read_state(folder), read_index(folder)
        names = set(metadata.state_dict_metadata)
        init_state(self.optimizers, {name.removeprefix("optim.") for name in names if name.startswith("optim.")})
        with self.optimizers.averaged():  # as it was saved
            mine = self.tensors()
            tensors = {name: tensor for name, tensor in mine.items() if name in names or not name.startswith("rng.")}
            asked = {name for part in self.parallel.gather(lambda: list(tensors), self.group) for name in part}
            for name in sorted(asked - names):
                raise CheckpointError(
                    f"checkpoint {folder} has no {name}: it was written with another model or optimizer"
                )
            for name in sorted(names - asked):
                if not name.startswith("rng."):
                    raise CheckpointError(f"checkpoint {folder} has {name}, which this model and optimizer do not")
            for name in named_numbers(self.optimizers):
                found = state["numbers"].get(name)
                if name.rpartition("/")[2] in COUNTERS and not (type(found) in (int, float) and 0 <= found < math.inf):
                    raise CheckpointError(f"checkpoint {folder}: {STATE} has {name}={found}: no counter of updates")
            load_tensors(tensors, folder, metadata, self.group)
            optim = {name.removeprefix("optim."): value for name, value in tensors.items() if name.startswith("optim.")}
            load_named(self.optimizers, optim, state["numbers"])
        for name, value in tensors.items():
            if name.startswith("rng.") and name.endswith(".cpu"):
                torch.set_rng_state(value)
            elif name.startswith("rng."):
                torch.cuda.set_rng_state(value, self.parallel.device)
        self.latest = state["step"]
        return Progress(**{field.name: state[field.name] for field in fields(Progress) if field.name in state})

    def close(self) -> None:
        self.pool.shutdown()  # waits
        self.stager.close()
