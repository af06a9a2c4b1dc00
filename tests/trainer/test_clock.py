"""The clock counts training only, and waits for the device at its edges."""

import pytest

from tests.runs import TINY, read_record
from trainer import loop
from trainer.loop import Trainer
from trainer.metrics.clock import Clock
from trainer.run.checkpoint import Checkpoints


class Time:
    """A hand-driven clock; ``queue`` seconds of device work are waited for by ``synchronize``."""

    def __init__(self):
        self.now, self.queue = 0.0, 0.0

    def __call__(self):
        return self.now

    def synchronize(self):
        self.now, self.queue = self.now + self.queue, 0.0


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def clock(time):
    return Clock(time.synchronize, time)


def test_counts_between_start_and_stop(clock, time):
    time.now = 5
    assert clock.seconds == 0
    clock.start()
    time.now = 7
    assert clock.seconds == 2
    clock.stop()
    time.now = 100
    assert clock.seconds == 2


def test_pause_is_not_counted_even_after_an_error(clock, time):
    clock.start()
    time.now = 1
    with pytest.raises(ZeroDivisionError), clock.paused():
        time.now = 50
        _ = 1 / 0
    time.now = 52
    assert clock.seconds == 3


def test_pause_of_a_standing_clock_leaves_it_standing(clock, time):
    with clock.paused():
        time.now = 9
    time.now = 20
    assert clock.seconds == 0


def test_queued_work_belongs_to_the_stretch_that_queued_it(clock, time):
    time.queue = 10  # queued before the start: not training
    clock.start()
    time.now += 1
    time.queue = 4
    with clock.paused():
        time.queue = 30  # validation
    assert clock.seconds == 5
    clock.stop()
    assert clock.seconds == 5


def test_starting_twice_changes_nothing(clock, time):
    clock.start()
    time.now = 3
    clock.start()
    assert clock.seconds == 3


def test_a_resumed_run_goes_on_from_its_time(clock, time):
    clock.total = 8
    clock.start()
    time.now += 2
    assert clock.seconds == 10


def test_a_run_counts_its_updates_alone(configure, tmp_path, monkeypatch, no_plot, time):
    """A hundred seconds for the warm-up, for every validation and for every checkpoint; one for an update."""
    settings = ["train.steps=4", "eval.every=2", "checkpoint.every=1", f"run.dir={tmp_path}/run"]
    config = configure(*TINY, *settings)
    done = []

    def takes(seconds, owner, name):
        act = getattr(owner, name)

        def timed(*arguments, **settings):
            time.now += seconds
            done.append(name)
            return act(*arguments, **settings)

        monkeypatch.setattr(owner, name, timed)

    takes(1, loop.Trainer, "train_step")
    for owner, name in ((loop, "warm_up"), (loop, "evaluate"), (Checkpoints, "save")):
        takes(100, owner, name)
    monkeypatch.setattr(loop, "Clock", lambda synchronize: Clock(time.synchronize, time))
    Trainer(config).run()
    assert [done.count(name) for name in ("warm_up", "evaluate", "save", "train_step")] == [1, 3, 4, 4]
    assert [line["train_time_s"] for line in read_record(tmp_path / "run") if "val/loss" in line] == [0, 2, 4]
