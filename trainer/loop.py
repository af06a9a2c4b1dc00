"""The Trainer: one run from the first batch to the last line of its record.

    tokens -> loss -> sharded gradients -> optimizers (matrices travel whole to their owner) -> weights -> record
"""

import math
from dataclasses import asdict

import torch

from data import Loader, eval_batches, open_split, prepare
from optim import routing, schedule
from trainer import parallel as parallel_module
from trainer.clock import Clock
from trainer.evaluate import validation_loss
from trainer.parallel import unwrap
from trainer.record import Record
from trainer.schema import Config


class TrainingError(RuntimeError):
    """The run cannot go on; the message says at which step and why."""


class Trainer:
    """Builds everything a run needs from its validated config; ``run()`` trains.

    Args:
        config: from ``schema.validate``.
    """

    def __init__(self, config: Config):
        train = config.train
        self.config = config
        self.parallel = parallel_module.setup(config.parallel, dtype=train.dtype, seed=config.seed)
        self.record = Record(config, self.parallel)
        if self.parallel.local_rank == 0:
            prepare(config.data)
        self.parallel.barrier()
        self.split = open_split(config.data)
        self.model = self.parallel.wrap(config.model, self.split.vocab_size, train.seq_len)
        self.optimizers = routing.build(
            unwrap(self.model), asdict(config.optim), torch.distributed.group.WORLD if self.parallel.mode == "ddp" else None
        )
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
        self.clock = Clock(self.parallel.synchronize)

    def run(self) -> float:
        """Train for ``train.steps`` updates.  Returns the last validation loss, in nats per token.

        A line of the record at step s holds what was measured on and after update s (s = 0: before the first).
        """
        steps, every = self.config.train.steps, self.config.eval.every
        self.record.start(self.optimizers.table(), unwrap(self.model).flops_per_token())
        self.warm_up()
        val_loss = self.evaluate()
        self.write(0, {"val/loss": val_loss})
        self.clock.start()
        for step in range(steps):
            metrics = self.update(step)
            if (step + 1) % every == 0 or step + 1 == steps:
                metrics["val/loss"] = val_loss = self.evaluate()
            self.write(step + 1, metrics)
        self.clock.stop()
        self.record.finish()
        self.loader.close()
        self.parallel.shutdown()
        return val_loss

    def update(self, step: int) -> dict[str, float]:
        """One update of the weights on the global batch of ``step``; returns what was measured, if it was due."""
        due = (step + 1) % self.config.logger.every == 0 or step + 1 == self.config.train.steps
        rates = self.optimizers.set_lr(self.multiplier(step))
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.parallel.device)
        batches = self.loader.batch(step)
        for i, (inputs, targets) in enumerate(batches):
            with self.parallel.accumulate(self.model, last=i + 1 == len(batches)):
                loss = self.model(inputs, targets)
                (loss / self.local_tokens).backward()
            loss_sum += loss.detach()
        clip = self.config.train.clip
        norm = self.parallel.clip(self.model, clip) if clip or due else None
        self.optimizers.step()
        self.optimizers.zero_grad()
        if not due:
            return {}
        loss = (self.parallel.sum(loss_sum) / self.config.train.batch_tokens).item()
        if not math.isfinite(loss):
            raise TrainingError(f"the loss of step {step + 1} is {loss}: lower optim.*.lr or set train.clip=1.0")
        lr = {f"lr/{role}": rate for role, rate in rates.items()}
        return {"train/loss": loss, "grad_norm": norm.item(), **lr}

    def evaluate(self) -> float:
        """Validation loss over ``eval.tokens`` tokens, off the clock."""
        with self.clock.paused():
            batches = eval_batches(
                self.split.val,
                seq_len=self.config.train.seq_len,
                tokens=self.config.eval.tokens,
                micro_batch=self.config.train.micro_batch,
                rank=self.parallel.rank,
                world_size=self.parallel.world_size,
                device=self.parallel.device,
            )
            return validation_loss(self.model, self.parallel, batches)

    def warm_up(self) -> None:
        """Compile and load kernels on a first pass whose gradients are thrown away, before the clock starts."""
        inputs, targets = self.loader.batch(0)[0]
        with self.parallel.accumulate(self.model, last=True):
            (self.model(inputs, targets) * 0.0).backward()
        self.optimizers.zero_grad()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """A line of the record, if there is anything to say."""
        tokens = step * self.config.train.batch_tokens
        if metrics:
            self.record.log(step=step, tokens=tokens, train_time_s=self.clock.seconds, **metrics)
