"""What goes wrong in a long run, and what all ranks then do together.

Stop                signals and time limits: all ranks stop, or save, after the same update
Watch               an update whose loss or gradient is not finite is not applied, on any rank
"""

import math
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common import UserError
from optim.matrix import local
from optim.routing import Optimizers
from trainer.config import NonFinite, TrainConfig
from trainer.parallel import Parallel

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TIME_OVER, LAUNCHER_GONE = 1001, 1002  # beside the numbers of signals
NCCL_MARGIN = 2  # minutes


class Preempted(Exception):
    """All ranks have agreed to stop here; the text says why."""


class Stop:
    """Whether to stop or to save now, agreed by all ranks between hosts, without the device.

    ``ask`` sends this rank's wishes, ``answer`` returns what any rank wished; whatever lies between overlaps with it.
    Under torchrun a worker also wishes to stop when its launcher is gone, or it would go on unseen.

    Args:
        max_minutes: wall-clock limit of this process.
        save_minutes: wall-clock time between checkpoints.
        now: seconds of a monotonic clock; tests give their own.
    """

    def __init__(
        self,
        parallel: Parallel,
        max_minutes: float | None = None,
        save_minutes: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self.max_minutes, self.save_minutes, self.now = max_minutes, save_minutes, now
        self.group = dist.new_group(backend="gloo") if parallel.world_size > 1 else None
        self.began = self.saved = now()
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.signal = 0
        self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: Any) -> None:
        self.signal = number

    def ask(self) -> None:
        minutes = (self.now() - self.began) / 60
        reason = self.signal
        if not reason and self.parent not in (None, os.getppid()):
            reason = LAUNCHER_GONE
        if not reason and self.max_minutes is not None and minutes >= self.max_minutes:
            reason = TIME_OVER
        save = self.save_minutes is not None and self.now() - self.saved >= 60 * self.save_minutes
        self.wishes = torch.tensor([reason, int(save)])
        if self.group is not None:
            self.work = dist.all_reduce(self.wishes, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def answer(self) -> tuple[str | None, bool]:
        """The reason to stop (None: go on), and whether a checkpoint is due by the clock on the wall."""
        if self.group is not None:
            self.work.wait()
        reason, save = self.wishes.tolist()
        named = {0: None, TIME_OVER: f"train.max_minutes={self.max_minutes}", LAUNCHER_GONE: "the loss of its launcher"}
        return named[reason] if reason in named else signal.Signals(reason).name, bool(save)

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until all ranks agree to stop.

        Raises:
            Preempted: on all ranks after the same item.
        """
        for item in items:
            self.ask()
            yield item
            reason, _ = self.answer()
            if reason:
                raise Preempted(reason)

    def saving(self) -> None:
        """A checkpoint is being saved: its time runs anew."""
        self.saved = self.now()

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *error: object) -> None:
        """Signals mean again what they meant before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Watch:
    """Applies an update only if its loss and gradient are finite, and notes losses that leap.

    The decision is taken from sums over all ranks, so it is the same everywhere.  On the CPU the host looks at them.
    On a GPU they stay on the device, which undoes the update itself; the host looks when it next writes a line.
    """

    def __init__(self, train: TrainConfig, parallel: Parallel):
        self.stops, self.limit = train.non_finite == NonFinite.stop, train.max_skips
        self.tokens, self.world_size = train.batch_tokens, parallel.world_size
        self.on_host = parallel.device.type == "cpu"
        self.skipped = 0  # updates in a row, up to the last one that was read
        self.longest = 0  # the most of them that were skipped in a row
        self.worst: tuple[int, float, float] | None = None  # step, loss, norm of the last that was not finite
        self.unread: list[tuple[int, Tensor]] = []
        self.bad: Tensor | None = None
        self.recent: deque[float] = deque(maxlen=64)  # finite losses

    def step(self, optimizers: Optimizers, step: int, totals: Tensor) -> None:
        """Update number ``step``, from 1.  ``totals`` [2]: the tokens' losses and the norm, both summed over ranks."""
        bad = ~torch.isfinite(totals).all()
        self.bad = bad if self.bad is None or not self.stops else self.bad | bad
        self.unread.append((step, totals))
        if not self.on_host:
            guarded_step(optimizers, self.bad)
        elif not self.bad:
            optimizers.step()

    def read(self) -> list[tuple[int, dict[str, Any]]]:
        """Step and line of every update since the last call; waits for the device."""
        found = []
        for step, totals in zip(*self._unread(), strict=True):
            loss, norm = totals[0] / self.tokens, totals[1] / self.world_size
            line = {"train/loss": loss, "grad_norm": norm}
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.skipped, self.worst = self.skipped + 1, (step, loss, norm)
                self.longest = max(self.longest, self.skipped)
                line |= {"skipped": self.skipped, "batch": step - 1}
            else:
                self.skipped = 0
                if is_spike(self.recent, loss):
                    line |= {"spike": loss - statistics.fmean(self.recent), "batch": step - 1}
                self.recent.append(loss)
            found.append((step, line))
        return found

    def _unread(self) -> tuple[list[int], list[list[float]]]:
        unread, self.unread = self.unread, []
        return [step for step, _ in unread], torch.stack([t for _, t in unread]).tolist() if unread else []

    def verdict(self) -> UserError | None:
        """Why the run must not go on, by what was read."""
        if self.worst is None or not (self.stops or self.longest > self.limit):
            return None
        step, loss, norm = self.worst
        if self.stops:
            mend = "the update was not applied; lower optim.*.lr, or set train.clip=1.0 or train.non_finite=skip"
        else:
            mend = f"{self.longest} updates in a row were skipped, train.max_skips={self.limit}"
        return UserError(f"step {step} has loss {loss} and gradient norm {norm}: {mend}")


@torch.no_grad()
def guarded_step(optimizers: Optimizers, bad: Tensor) -> None:
    """``optimizers.step()``, but where ``bad`` (a bool on the device) holds nothing changes; the host never waits.

    Gradients become zero first, so that no rule meets a NaN.  torch's fused optimizers take the flag themselves, as
    from GradScaler.  For the others a copy is kept during their step, in memory that the activations have left.  What
    counts steps on the host counts this one too.
    """
    for member in optimizers.members.values():
        params = [p for group in member.param_groups for p in group["params"] if p.grad is not None]
        for param in params:
            local(param.grad).masked_fill_(bad, 0.0)
        if getattr(member, "_step_supports_amp_scaling", False):
            member.grad_scale, member.found_inf = None, bad.float()
            member.step()
            continue
        holders = [{"param": param} for param in params] + [member.state[param] for param in params]
        kept = [
            (holder, key, local(value).clone())
            for holder in holders
            for key, value in holder.items()
            if isinstance(value, Tensor) and value.device == bad.device
        ]
        member.step()
        for holder, key, before in kept:
            now = local(holder[key])
            now.copy_(torch.where(bad, before, now))


def is_notable(line: Mapping[str, Any]) -> bool:
    """Whether a line must be written although none was due."""
    return "skipped" in line or "spike" in line


def is_spike(recent: Sequence[float], loss: float, deviations: float = 6.0) -> bool:
    """Whether ``loss`` exceeds the mean of the recent ones by so many of their standard deviations."""
    if len(recent) < 16:
        return False
    return loss > statistics.fmean(recent) + deviations * statistics.pstdev(recent)


def set_timeouts(minutes: float, *, but: dist.ProcessGroup | None = None) -> None:
    """How long collectives of all process groups wait from now on.

    NCCL's wait longer: when its time is over it ends the process at once, and nobody would be left to name the rank
    that hangs, which the hosts miss between each other.
    """
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            margin = NCCL_MARGIN if "nccl" in dist.get_backend(group) else 0
            if group is not but:
                dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes + margin), group)
