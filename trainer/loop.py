"""The Trainer: one run from the first batch to the last line of its record.

tokens -> loss -> sharded gradients -> optimizers (matrices travel whole to their owner) -> weights -> record
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common import UserError
from data import Loader, eval_batches, open_split, prepare
from optim import routing, schedule
from trainer import parallel as parallel_module
from trainer.clock import Clock
from trainer.config import Config
from trainer.evaluate import validation_loss
from trainer.guard import Preempted, Stop, Watch, is_notable, set_timeouts
from trainer.metrics.record import Record
from trainer.parallel import unwrap
from trainer.run import resume
from trainer.run.checkpoint import CheckpointError, Checkpoints
from trainer.warmup import warm_up


class Trainer:
    """Builds everything a run needs from its validated config; ``run()`` trains.

    Args:
        config: from ``schema.validate``.
    """

    def __init__(self, config: Config):
        self.config = config
        self.parallel = parallel_module.setup(config.parallel, dtype=config.train.dtype, seed=config.seed)
        set_timeouts(config.parallel.timeout_minutes)
        self.build()

    def build(self) -> None:
        """Data, model, optimizers and where the run goes on; the ranks meet several times on the way."""
        config, train = self.config, self.config.train
        self.lock = resume.hold(Path(config.run.dir)) if self.parallel.is_main else None
        self.stop = Stop(self.parallel, train.max_minutes, config.checkpoint.minutes)
        self.record = Record(config, self.parallel)
        self.parallel.once_a_node(lambda: prepare(config.data))
        self.split = open_split(config.data)
        starts = self.split.eos if config.data.document_mask else None
        self.model = self.parallel.wrap(config.model, self.split.vocab_size, train.seq_len, starts)
        replicas = torch.distributed.group.WORLD if self.parallel.mode == "ddp" else None
        self.optimizers = routing.build(unwrap(self.model), asdict(config.optim), replicas)
        self.multiplier = schedule.build(**asdict(config.schedule), steps=train.steps)
        self.loader = Loader(
            self.split.train,
            seq_len=train.seq_len,
            batch_sequences=train.batch_tokens // train.seq_len,
            order=config.data.order,
            seed=config.seed,
            rank=self.parallel.rank,
            world_size=self.parallel.world_size,
            micro_batch=train.micro_batch,
            device=self.parallel.device,
            vocab_size=self.split.vocab_size,
        )
        self.local_tokens = train.batch_tokens // self.parallel.world_size
        self.watch = Watch(train, self.parallel)
        self.clock = Clock(self.parallel.synchronize)
        self.checkpoints = Checkpoints(config, self.parallel, self.model, self.optimizers, self.record.sync)
        self.progress, self.news = resume.resume(config, self.parallel, self.checkpoints)
        self.clock.load_state_dict({"seconds": self.progress.seconds})
        self.watch.skipped = self.progress.skipped
        self.to_tell: dict[str, Any] = {}  # goes into the next line of the record

    def run(self) -> float | None:
        """Train for ``train.steps`` updates, or until all ranks agree to stop.  Returns the last validation loss.

        A line of the record at step s holds what was measured on and after update s (s = 0: before the first).
        """
        table, flops, farewell = self.optimizers.table(), unwrap(self.model).flops_per_token(), None
        with self.stop:
            unfinished = self.progress.line is not None
            self.record.start(table, flops, step=self.progress.step, unfinished=unfinished)
            for line in self.news:
                self.record.message(line)
            self.warm_up()
            try:
                self.train()
            except Preempted as reason:
                farewell = self.leave(reason)
            self.record.finish(farewell)
        if self.config.checkpoint.saves and self.checkpoints.latest != self.progress.step:
            raise UserError(
                f"all updates are done, but the last checkpoint could not be saved in {self.checkpoints.folder}: make "
                "room there and start the same command again"
            )
        self.checkpoints.close()
        self.loader.close()
        if self.lock:
            self.lock.close()
        self.parallel.shutdown()
        return self.progress.val_loss

    def train(self) -> None:
        """Every update still to be done, each with its evaluation, its line of the record and its checkpoint."""
        progress, first, steps = self.progress, self.progress.step + 1, self.config.train.steps
        if progress.line is not None:  # the run begins, or was stopped before this evaluation was done
            self.evaluate()
            self.write()
        self.clock.start()
        while progress.step < steps:
            progress.line, told_to_stop, time_to_save = self.update(progress.step)
            progress.step += 1
            if broken := self.watch.verdict():
                self.write()
                self.checkpoints.wait()
                raise broken
            if self.is_time(self.config.eval.every, progress.step):
                if told_to_stop:
                    raise Preempted(told_to_stop)
                self.evaluate()
            self.write()
            if told_to_stop:
                raise Preempted(told_to_stop)
            if time_to_save or self.is_time(self.config.checkpoint.every, progress.step):
                self.save()
            self.hear_of_save()
            if progress.step == first:  # everything is compiled and connected
                set_timeouts(self.config.train.timeout_minutes, but=self.checkpoints.group)
        self.clock.stop()
        if self.config.checkpoint.saves:
            self.save(wait=True)

    def update(self, step: int) -> tuple[dict[str, Any], str | None, bool]:
        """One update of the weights on the global batch of ``step``.

        Returns what was measured, if it was due; and on what all ranks agree: a reason to stop, and whether the clock
        on the wall says to save.
        """
        rates = self.optimizers.set_lr(self.multiplier(step))
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.parallel.device)
        batches = self.loader.batch(step)
        for i, (inputs, targets) in enumerate(batches):
            with self.parallel.accumulate(self.model, last=i + 1 == len(batches)):
                loss = self.model(inputs, targets)
                (loss / self.local_tokens).backward()
            loss_sum += loss.detach()
        norm = self.parallel.clip(self.model, self.config.train.clip)
        self.stop.ask()
        self.watch.step(self.optimizers, step + 1, self.parallel.sum(torch.stack([loss_sum, norm.double()])))
        self.optimizers.zero_grad()
        agreed = self.stop.answer()  # before the device is waited for: a rank that hangs is missed between hosts
        due = self.is_time(self.config.logger.every, step + 1) or self.is_time(self.config.eval.every, step + 1)
        if not due and not self.watch.on_host:
            return {}, *agreed  # the device is not waited for
        *earlier, (_, line) = self.watch.read()
        self.log_notable(earlier)
        line |= {f"lr/{role}": rate for role, rate in rates.items()}
        return line if due or is_notable(line) else {}, *agreed

    def evaluate(self) -> None:
        """Add the validation loss over ``eval.tokens`` tokens to the line; off the clock.

        Raises:
            Preempted: all ranks agreed to stop in the middle.
        """
        progress = self.progress
        with self.clock.paused():
            batches = eval_batches(
                self.split.val,
                seq_len=self.config.train.seq_len,
                tokens=self.config.eval.tokens,
                micro_batch=self.config.train.micro_batch,
                rank=self.parallel.rank, world_size=self.parallel.world_size,
                device=self.parallel.device, vocab_size=self.split.vocab_size,
            )
            progress.note_val_loss(validation_loss(self.model, self.parallel, self.stop.between(batches)))
        progress.line["val/loss"] = progress.val_loss

    def warm_up(self) -> None:
        """Compile and load all kernels before the clock starts; nothing else stays of it."""
        warm_up(self.model, self.optimizers, self.parallel, self.loader.batch(self.progress.step)[0])

    def save(self, wait: bool = False) -> None:
        """A checkpoint of this step, written in the background (or at once); off the clock."""
        start = time.perf_counter()
        with self.clock.paused():
            self.hear_of_save(wait=True)
            if self.checkpoints.latest == self.progress.step:
                return
            self.log_notable(self.watch.read())
            if broken := self.watch.verdict():  # seen only now: on a GPU the host looks where a line is due
                raise broken
            self.record.retry()
            self.progress.seconds, self.progress.skipped = self.clock.seconds, self.watch.skipped
            self.checkpoints.save(self.progress)
            self.stop.saving()
            self.hear_of_save(wait=wait)
        self.to_tell["perf/checkpoint_pause_s"] = time.perf_counter() - start

    def hear_of_save(self, wait: bool = False) -> None:
        """A checkpoint that failed is shown and recorded; training goes on."""
        outcome = self.checkpoints.outcome(wait)
        if isinstance(outcome, CheckpointError):
            self.record.message(f"warning: a checkpoint failed, the one before it stays: {outcome}")
            self.to_tell["checkpoint/failed"] = str(outcome)

    def leave(self, reason: Preempted) -> str:
        """Save at once; returns how to go on."""
        self.save(wait=True)
        where = f"stopped by {reason} after update {self.progress.step} of {self.config.train.steps}"
        if self.checkpoints.latest != self.progress.step:
            raise UserError(f"{where}, which could not be saved")
        return f"{where}, and saved; to go on, start the same command with run.dir={self.config.run.dir}"

    def is_time(self, every: int | None, step: int) -> bool:
        """Whether what happens every so many updates, and after the last, happens after update ``step``."""
        return bool(every) and (step % every == 0 or step == self.config.train.steps)

    def write(self) -> None:
        """The line of the current step, if there is anything to say."""
        line, self.progress.line = self.progress.line, None
        if line:
            self.log(self.progress.step, line)

    def log_notable(self, measured: list[tuple[int, dict[str, Any]]]) -> None:
        for step, line in measured:
            if is_notable(line):
                self.log(step, line)

    def log(self, step: int, line: dict[str, Any]) -> None:
        told, self.to_tell = self.to_tell, {}
        tokens = step * self.config.train.batch_tokens
        self.record.log(step=step, tokens=tokens, train_time_s=self.clock.seconds, **line, **told)
