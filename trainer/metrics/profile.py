"""What the updates of ``train.profile`` did and when, in RUN/profile: a trace of each rank for https://ui.perfetto.dev,
and on CUDA its memory for https://pytorch.org/memory_viz.

The history of CUDA's memory has no public name in torch; its documentation calls the two used here.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from trainer.config import Config
from trainer.metrics.clock import Clock
from trainer.parallel import Parallel
from trainer.schedules.due import profiled

EVENTS = 100_000  # allocations that are kept, the latest


class Profile:
    def __init__(self, config: Config, parallel: Parallel, clock: Clock):
        self.updates, self.clock = profiled(config.train.profile, config.train.steps), clock
        self.folder, self.rank = config.run.path / "profile", parallel.rank
        self.on_gpu = parallel.device.type == "cuda"
        self.profiler: profile | None = None
        self.traced: list[int] = []

    @contextmanager
    def update(self, number: int) -> Iterator[None]:
        """Around update ``number``, from 1.  Starting and writing are off the clock; the updates take longer."""
        if number not in self.updates:
            yield
            return
        if self.profiler is None:
            with self.clock.paused():
                self._start()
        with record_function(f"update {number}"):
            yield
        self.traced.append(number)
        if number == self.updates[-1]:
            with self.clock.paused():
                self.close()

    def _start(self) -> None:
        gpu = [ProfilerActivity.CUDA] if self.on_gpu else []
        self.profiler = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True)
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=EVENTS)
        self.profiler.start()

    def close(self) -> None:
        """Write what has been traced and is not written yet: of a run that was stopped, too."""
        if self.profiler is None:
            return
        self.profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"updates-{self.traced[0]}-{self.traced[-1]}-rank{self.rank}"
        self.profiler.export_chrome_trace(str(self.folder / f"{name}.json.gz"))
        if self.on_gpu:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self.profiler = None
