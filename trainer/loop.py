"""The Trainer: one run from the first batch to the last line of its record.

tokens -> loss -> sharded gradients -> optimizers (matrices travel whole to their owner) -> weights -> record
"""

import time
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from common import UserError
from data import Loader, open_split, prepare
from optim import routing
from trainer.config import Config
from trainer.evaluate.measure import evaluate
from trainer.evaluate.validation import loss_bins, validation_batches
from trainer.guard import NonFiniteGuard, QKClip, check_replicas
from trainer.metrics.clock import Clock
from trainer.metrics.profile import Profile
from trainer.metrics.record import Metrics
from trainer.parallel import setup, unwrap
from trainer.run.checkpoint import Checkpoints
from trainer.run.directory import acquire_run_dir, run_id
from trainer.run.initial import load_initial
from trainer.run.micro_batch import use_micro_batch
from trainer.run.preemption import Preempted, Preemption
from trainer.run.resume import resume
from trainer.run.timeouts import set_timeouts
from trainer.run.warmup import warm_up
from trainer.schedules.config import loss_scale
from trainer.schedules.due import is_time
from trainer.schedules.steps import Schedules


class Trainer:
    """Everything a run needs, built from its config; ``run()`` trains.

        from trainer.launch import load_config
        Trainer(load_config(["experiment=smoke", "logger=jsonl"])).run()

    Raises UserError: the run's directory, data or checkpoints cannot be used.
    """

    def __init__(self, config: Config):
        self.config, train = config, config.train
        self.parallel = setup(config.parallel, dtype=train.dtype, seed=config.seed)
        set_timeouts(config.parallel.timeout_minutes)
        config.run.dir = self.parallel.broadcast_rank0(lambda: acquire_run_dir(config))
        self.parallel.once_a_node(lambda: prepare(config.data))
        self.split = open_split(config.data)
        starts = self.split.eos if config.data.document_mask else None
        self.model = self.parallel.wrap(config.model, self.split.vocab_size, train.seq_len, starts)
        load_initial(config, self.model, self.parallel)
        bare = unwrap(self.model)
        self.optimizers = routing.build_from_config(bare, asdict(config.optim), self.parallel.replicas, bare.head)
        self.schedules = Schedules(config, bare, self.optimizers)
        self.qk_clip = QKClip(config.optim.qk_clip, bare, self.parallel)
        self.bins = loss_bins(config, self.split, self.parallel)
        self.divisor = train.batch_tokens // loss_scale(train) / self.parallel.world_size
        self.shares = torch.tensor([train.batch_tokens, self.parallel.world_size], device=self.parallel.device)
        self.guard = NonFiniteGuard(train, self.parallel.device)
        self.clock = Clock(self.parallel.synchronize)
        self.profile = Profile(config, self.parallel, self.clock)
        self.preemption = Preemption(self.parallel.world_size, train.max_minutes, config.checkpoint.minutes)
        self.metrics = Metrics(config, self.parallel, run_id(config.run.path), self.split)
        state = self.model, self.optimizers, self.schedules.state()
        self.checkpoints = Checkpoints(config, self.parallel, *state, self.split, self.metrics.sync)
        self.progress, self.notices, self.lock = resume(config, self.parallel, self.checkpoints)
        self.clock.total, self.guard.skipped = self.progress.seconds, self.progress.skipped
        self.loader = Loader(
            self.split.train, seq_len=train.seq_len, batch_sequences=train.batch_tokens // train.seq_len,
            order=config.data.order, seed=config.seed, micro_batch=train.micro_batch, vocab_size=self.split.vocab_size,
            rank=self.parallel.rank, world_size=self.parallel.world_size, device=self.parallel.device,
        )  # fmt: skip

    def run(self) -> float | None:
        """Train for ``train.steps`` updates or until all ranks agree to stop; gives the last val loss [nats/token]."""
        with self.lock, self.preemption:
            train, step, flops = self.config.train, self.progress.step, unwrap(self.model).flops_per_token()
            self.metrics.start(self.optimizers.table(), flops, step, self.eval_is_due(step), self.progress.branch)
            for notice in self.notices:
                self.metrics.message(notice)
            fits = warm_up(self.model, self.optimizers, self.parallel, self.loader.batch(step))
            use_micro_batch(fits, train, self.loader, self.progress, self.metrics.message)
            reason = self.train()
            self.metrics.finish(reason, self.progress.step)
            if (reason or self.config.checkpoint.last) and self.checkpoints.latest != self.progress.step:
                what = f"the checkpoint after update {self.progress.step} could not be saved"
                raise UserError(f"{self.checkpoints.folder}: {what}; make room there and start the same command again")
            for part in (self.profile, self.checkpoints, self.loader, self.parallel):
                part.close()
        return self.progress.val_loss

    def train(self) -> str | None:
        """Every update still to be done, each with its evaluation, its line of the record and its checkpoint.

        Returns why all ranks agreed to stop; None when all updates are done.
        """
        first, steps, reason, save = self.progress.step, self.config.train.steps, None, False
        for step in range(first, steps + 1):
            if self.eval_is_due(step) and not reason:
                try:
                    self.metrics.add(step, self.evaluate())
                except Preempted as stopped:
                    reason = str(stopped)
            self.metrics.write(step, self.clock.seconds)
            if reason or step == steps:
                break
            if step > first and (save or is_time(self.config.checkpoint.every, step, steps)):
                self.save()
            self.poll_async_save()
            self.clock.start()
            with self.profile.update(step + 1):
                reason, save = self.train_step(step)
            self.progress.step = step + 1
            if self.guard.on_host or self.metrics.is_due(step + 1):
                self.check_guard()
            if step == first:  # everything is compiled and connected
                set_timeouts(self.config.train.timeout_minutes, but=self.checkpoints.group)
        self.clock.stop()
        self.poll_async_save(wait=True)  # it makes the record durable, which is closed next
        if reason or self.config.checkpoint.last:
            self.save(wait=True)
        return reason

    def train_step(self, step: int) -> tuple[str | None, bool]:
        """One update of the weights on the global batch of ``step``.

        Returns on what all ranks agree: a reason to stop, and whether it is time to save by ``checkpoint.minutes``.
        """
        lrs = self.schedules.start_step(step)
        loss = self.forward_backward(step)
        norm = self.parallel.clip(self.model, self.config.train.clip, loss_scale(self.config.train))
        self.preemption.start_poll()
        means = self.parallel.sum(torch.stack([loss, norm.double()])) / self.shares
        skipped = self.guard.step(self.optimizers, step + 1, means)
        self.qk_clip.step(skipped)
        self.schedules.end_step(step)
        self.optimizers.zero_grad()
        measured = {"train/loss": means[0], "grad_norm": means[1], "skipped": skipped}
        self.metrics.add(step + 1, measured | {f"lr/{role}": lr for role, lr in lrs.items()})
        return self.preemption.finish_poll()

    def forward_backward(self, step: int) -> Tensor:
        """Add the gradient of the batch's loss; returns the sum of this rank's token losses, a float64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.parallel.device)
        batches = self.loader.batch(step)
        for i, (inputs, targets) in enumerate(batches):
            with self.parallel.accumulate(self.model, last=i + 1 == len(batches)):
                loss = self.model(inputs, targets)
                (loss / self.divisor).backward()
            total += loss.detach()
        return total

    def check_guard(self) -> None:
        """Raises UserError if the run must not go on; what was measured, and the last checkpoint, are written then."""
        try:
            self.guard.check()
        except UserError:
            self.metrics.write(self.progress.step, self.clock.seconds, at_once=True)
            self.checkpoints.wait()
            raise

    def eval_is_due(self, step: int) -> bool:
        """Whether the weights after update ``step`` are to be evaluated, and have not been before a resume."""
        return self.schedules.eval_is_due(step) and self.progress.val_step != step

    def evaluate(self) -> dict[str, Any]:
        """What is measured on the validation set; off the clock.  Raises Preempted: all ranks agreed to stop."""
        with self.clock.paused():
            check_replicas(self.model, self.optimizers, self.schedules.state(), self.parallel)
            batches = self.preemption.interruptible(validation_batches(self.config, self.split, self.parallel))
            with self.schedules.evaluated(self.progress.step):
                measured = evaluate(self.config, self.model, self.parallel, self.split, batches, self.bins)
        self.progress.note_val_loss(measured["val/loss"])
        return measured

    def save(self, wait: bool = False) -> None:
        """A checkpoint of this step, written in the background (or at once); off the clock."""
        start, step = time.perf_counter(), self.progress.step
        with self.clock.paused():
            self.poll_async_save(wait=True)
            if self.checkpoints.latest == step:
                return
            self.metrics.write(step, self.clock.seconds, at_once=True)
            self.check_guard()  # on a GPU the host may not have looked since the last line
            self.metrics.retry()
            self.progress = replace(self.progress, seconds=self.clock.seconds, skipped=self.guard.skipped)
            self.checkpoints.save(self.progress)
            self.preemption.mark_saved()
            self.poll_async_save(wait=wait)
        self.metrics.note(**{"perf/checkpoint_pause_s": time.perf_counter() - start})

    def poll_async_save(self, wait: bool = False) -> None:
        """A checkpoint that failed is shown and recorded; training goes on."""
        if fault := self.checkpoints.poll(wait):
            self.metrics.message(f"warning: a checkpoint failed, the one before it stays: {fault}")
            self.metrics.note(**{"checkpoint/failed": fault})
