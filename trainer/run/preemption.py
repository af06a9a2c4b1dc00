"""Signals, time limits, a lost launcher: all ranks stop, or save, after the same update."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import common

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TIME_OVER, LAUNCHER_GONE = 1001, 1002  # beside the numbers of signals


started = threading.Event()
"""A :class:`Preemption` has begun to look after the launcher."""


def launcher_is_gone() -> bool:
    """Torchrun's agent has ended and left its workers behind."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != common.LAUNCHER


def leave_with_launcher() -> None:
    """Until a run has begun, end this process where its launcher is gone: it would wait for the launcher's store."""

    def watch() -> None:
        while not started.wait(1):
            if launcher_is_gone():
                print("error: the launcher has gone before the run began", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Preempted(Exception):
    """All ranks have agreed to stop here; the text says why."""


class Preemption:
    """Whether to stop or to save now, agreed by all ranks between hosts, without the device.

    ``start_poll`` sends this rank's flags, ``finish_poll`` returns what any rank has raised; whatever lies between
    overlaps with it.  Under torchrun a worker also asks to stop when its launcher is gone, or it would go on unseen.

    Args:
        world_size: ranks that call alike.
        max_minutes: wall-clock limit of this process.
        save_minutes: wall-clock time between checkpoints.
        now: seconds of a monotonic clock; tests give their own.
    """

    def __init__(
        self,
        world_size: int,
        max_minutes: float | None = None,
        save_minutes: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self.max_minutes, self.save_minutes, self.now = max_minutes, save_minutes, now
        self.group = dist.new_group(backend="gloo") if world_size > 1 else None
        self.started = self.saved = now()
        self.signal = 0
        started.set()
        # Python lets only its main thread listen to signals; a notebook's worker thread goes without.
        handled = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self.previous = {number: signal.signal(number, self._receive) for number in handled}

    def _receive(self, number: int, frame: Any) -> None:
        self.signal = number

    def start_poll(self) -> None:
        minutes = (self.now() - self.started) / 60
        reason = self.signal
        if not reason and launcher_is_gone():
            reason = LAUNCHER_GONE
        if not reason and self.max_minutes is not None and minutes >= self.max_minutes:
            reason = TIME_OVER
        save = self.save_minutes is not None and self.now() - self.saved >= 60 * self.save_minutes
        self.flags = torch.tensor([reason, int(save)])
        if self.group is not None:
            self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def finish_poll(self) -> tuple[str | None, bool]:
        """The reason to stop (None: go on), and whether a checkpoint is due by the clock on the wall."""
        if self.group is not None:
            self.work.wait()
        reason, save = self.flags.tolist()
        names = {0: None, TIME_OVER: f"train.max_minutes={self.max_minutes}", LAUNCHER_GONE: "the loss of its launcher"}
        return names[reason] if reason in names else signal.Signals(reason).name, bool(save)

    def interruptible(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until all ranks agree to stop.  Raises Preempted: on all ranks after the same item."""
        for item in items:
            self.start_poll()
            yield item
            reason, _ = self.finish_poll()
            if reason:
                raise Preempted(reason)

    def mark_saved(self) -> None:
        """A checkpoint is being saved: ``save_minutes`` run anew."""
        self.saved = self.now()

    def __enter__(self) -> "Preemption":
        return self

    def __exit__(self, *error: object) -> None:
        """Signals mean again what they meant before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
