"""What jobs.py may do to a run before it trains, to make it fail as tests need it."""

import os
import resource
import signal
import time

import torch

from trainer.loop import Trainer
from trainer.parallel import Parallel, local
from trainer.run.checkpoint import Checkpoints


def before_update(act) -> None:
    """Call ``act(trainer, step)`` before every update, numbered from 0."""
    train_step = Trainer.train_step

    def patched(self, step):
        act(self, step)
        return train_step(self, step)

    Trainer.train_step = patched


def send(rank: int, *, step: int, to: int, number: int = signal.SIGTERM) -> None:
    """A signal to the process of one rank while it does update ``step``."""

    def act(trainer, now):
        if (rank, now) == (to, step):
            os.kill(os.getpid(), number)

    before_update(act)


def poison(rank: int, *, steps: list[int], on: int, value: float = float("nan")) -> None:
    """Something that is not finite in one gradient of one rank."""
    clip, now = Parallel.clip, [0]

    def patched(self, model, max_norm=None):
        if rank == on and now[0] in steps:
            gradient = next(p.grad for p in model.parameters() if p.grad is not None and local(p.grad).numel())
            local(gradient).view(-1)[0] = value
        return clip(self, model, max_norm)

    Parallel.clip = patched
    before_update(lambda trainer, step: now.__setitem__(0, step))


def full_disk(rank: int, *, first: int, last: int, limit: int) -> None:
    """From update ``first`` to ``last`` no file of rank 0 may grow beyond ``limit`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def act(trainer, step):
        if rank == 0 and step in (first, last + 1):
            trainer.checkpoints.wait()  # the save before belongs to the time before
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit if first <= step <= last else most, most))

    before_update(act)


def slow_saves(rank: int, *, seconds: float) -> None:
    """Saving takes its time, so that most moments are moments of saving."""
    write = Checkpoints._write

    def patched(self, *arguments):
        time.sleep(seconds)
        return write(self, *arguments)

    Checkpoints._write = patched


def digest_weights(rank: int, *, path: str) -> None:
    """Append a checksum of this rank's weights and optimizer state before every update to a file."""

    def act(trainer, step):
        tensors = {k: local(v) for k, v in trainer.checkpoints.tensors().items() if not k.startswith("rng/")}
        total = sum(t.double().abs().sum() * (i + 1) for i, t in enumerate(tensors.values()) if t.numel())
        with open(f"{path}.{rank}", "a") as file:
            file.write(f"{torch.as_tensor(total).item()!r}\n")

    before_update(act)


def stop_in_evaluation(rank: int, *, step: int, of: int) -> None:
    """A signal to rank ``of`` between two batches of the evaluation at ``step``."""
    from trainer import loop

    evaluate = loop.evaluate

    def patched(model, parallel, batches):
        def interrupted():
            for number, batch in enumerate(batches):
                if trainer[0].progress.step == step and rank == of and number == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        return evaluate(model, parallel, interrupted())

    trainer, start = [None], Trainer.__init__

    def remembered(self, config):
        trainer[0] = self
        start(self, config)

    Trainer.__init__, loop.evaluate = remembered, patched


def poison_and_digest(rank: int, *, steps: list[int], on: int, path: str) -> None:
    poison(rank, steps=steps, on=on)
    digest_weights(rank, path=path)
