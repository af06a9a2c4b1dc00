"""The clock counts training only, and waits for the device at its edges."""

import pytest

from trainer.clock import Clock


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


@pytest.mark.parametrize("running", [False, True])
def test_state_goes_on(clock, time, running):
    clock.start()
    time.now = 8
    state = clock.state_dict()
    other = Clock(time.synchronize, time)
    if running:
        other.start()
        time.now = 10
    other.load_state_dict(state)
    other.start()
    time.now += 2
    assert other.seconds == 10
