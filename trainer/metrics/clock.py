"""Training time: runs while the model is trained, stands still during validation and saving."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """A stopwatch whose edges wait for the device, so that queued work is counted where it was queued.

    Args:
        synchronize: returns when the device has finished what it was given.
        now: seconds of a monotonic clock; tests give their own.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None, now: Callable[[], float] = time.perf_counter):
        self.synchronize, self.now = synchronize, now
        self.total = 0.0  # seconds up to the last stop; a resumed run sets those before
        self.since: float | None = None  # start of the current stretch; None while the clock stands still

    def start(self) -> None:
        """Run.  Does nothing if the clock runs already."""
        if self.since is None:
            self.synchronize()
            self.since = self.now()

    def stop(self) -> None:
        """Stand still.  Does nothing if the clock stands already."""
        if self.since is not None:
            self.synchronize()
            self.total, self.since = self.seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still inside; afterwards run again only if the clock ran before."""
        ran = self.since is not None
        self.stop()
        try:
            yield
        finally:
            if ran:
                self.start()

    @property
    def seconds(self) -> float:
        """Training time so far.  Reading it does not wait for the device."""
        return self.total + (0.0 if self.since is None else self.now() - self.since)
