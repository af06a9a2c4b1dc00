"""What jobs.py may do to a run before it trains, to make it fail as tests need it.

Every hook works in the one process that it is called in, and in the same way: ``around`` puts a function around one of
the trainer's.
"""

import functools
import os
import resource
import signal
from collections.abc import Callable
from typing import Any

import torch

from optim.named_state import replicated_tensors
from trainer import loop
from trainer.loop import Trainer
from trainer.metrics import record
from trainer.parallel import Parallel, local, unwrap


def around(owner: Any, name: str) -> Callable:
    """Decorates a function that is called instead of ``owner.name``, with that one as its first argument."""
    original = getattr(owner, name)

    def decorate(function: Callable) -> Callable:
        @functools.wraps(original)
        def replacement(*arguments, **settings):
            return function(original, *arguments, **settings)

        setattr(owner, name, replacement)
        return function

    return decorate


def no_plot() -> None:
    """The picture of a run takes a second, and has tests of its own."""
    around(record, "loss_vs_time")(lambda *_: None)


def before_update(act: Callable[[Trainer, int], None]) -> None:
    """Call ``act(trainer, step)`` before every update, numbered from 0."""

    @around(Trainer, "train_step")
    def train_step(original, trainer, step):
        act(trainer, step)
        return original(trainer, step)


def send(rank: int, *, step: int, to: int, number: int = signal.SIGTERM) -> None:
    """A signal to the process of one rank while it does update ``step``."""

    def act(trainer, now):
        if (rank, now) == (to, step):
            os.kill(os.getpid(), number)

    before_update(act)


def poison(rank: int, *, steps: list[int], on: int, value: float = float("nan")) -> None:
    """Something that is not finite in one gradient of one rank."""
    now = None

    def act(trainer, step):
        nonlocal now
        now = step

    @around(Parallel, "clip")
    def clip(original, parallel, model, *limit):
        if rank == on and now in steps:
            gradient = next(p.grad for p in model.parameters() if p.grad is not None and local(p.grad).numel())
            local(gradient).view(-1)[0] = value
        return original(parallel, model, *limit)

    before_update(act)


def full_disk(rank: int, *, first: int, last: int, limit: int) -> None:
    """From update ``first`` to ``last`` no file of rank 0 may grow beyond ``limit`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def act(trainer, step):
        if rank == 0 and step in (first, last + 1):
            trainer.checkpoints.wait()  # the save before belongs to the time before
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit if first <= step <= last else most, most))

    before_update(act)


def digest_weights(rank: int, *, path: str) -> None:
    """Append a checksum of this rank's weights and optimizer state before every update to a file."""

    def act(trainer, step):
        tensors = {k: local(v) for k, v in trainer.checkpoints.tensors().items() if not k.startswith("rng.")}
        total = sum(t.double().abs().sum() * (i + 1) for i, t in enumerate(tensors.values()) if t.numel())
        with open(f"{path}.{rank}", "a") as file:
            file.write(f"{torch.as_tensor(total).item()!r}\n")

    before_update(act)


def poison_and_digest(rank: int, *, steps: list[int], on: int, path: str) -> None:
    poison(rank, steps=steps, on=on)
    digest_weights(rank, path=path)


def stop_in_evaluation(rank: int, *, step: int, of: int) -> None:
    """A signal to rank ``of`` between two batches of the evaluation at ``step``."""
    now = None

    @around(Trainer, "evaluate")
    def evaluate(original, trainer):
        nonlocal now
        now = trainer.progress.step
        return original(trainer)

    @around(loop, "evaluate")
    def evaluate_batches(original, config, model, parallel, split, batches, bins):
        return original(config, model, parallel, split, interrupted(batches), bins)

    def interrupted(batches):
        for number, batch in enumerate(batches):
            if now == step and rank == of and number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def flip_bit(rank: int, *, step: int, on: int, tensor: str) -> None:
    """One bit of one weight, average or state of one rank, as a fault of its memory would, before update ``step``."""

    def act(trainer, now):
        if (rank, now) == (on, step):
            weights = dict(unwrap(trainer.model).named_parameters())
            held = weights | trainer.schedules.state() | replicated_tensors(trainer.optimizers)
            local(held[tensor].detach()).view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 24)

    before_update(act)
