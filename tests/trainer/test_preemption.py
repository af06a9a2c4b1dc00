"""Signals and limits: what one process does about them."""

import os
import signal
import threading

import pytest

import common
from trainer.run.preemption import Preempted, Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_heard_and_given_back(number):
    before = signal.getsignal(number)
    with Preemption(1) as preemption:
        preemption.start_poll()
        assert preemption.finish_poll() == (None, False)
        os.kill(os.getpid(), number)
        assert preemption.finish_poll() == (None, False), "what was asked before the signal"
        preemption.start_poll()
        assert preemption.finish_poll() == (number.name, False)
    assert signal.getsignal(number) == before


def test_limits_of_time():
    now = [1000.0]
    with Preemption(1, max_minutes=3, save_minutes=2, now=lambda: now[0]) as preemption:

        def after(seconds: float) -> tuple:
            now[0] += seconds
            preemption.start_poll()
            return preemption.finish_poll()

        assert after(119) == (None, False)
        assert after(2) == (None, True)
        preemption.mark_saved()
        assert after(58) == (None, False)
        assert after(2) == ("train.max_minutes=3", False)


def test_a_lost_launcher_is_noticed(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    with Preemption(1) as preemption:
        preemption.start_poll()
        assert preemption.finish_poll() == (None, False)
        monkeypatch.setattr(os, "getppid", lambda: 1 - common.LAUNCHER)  # another process
        preemption.start_poll()
        assert preemption.finish_poll() == ("the loss of its launcher", False)


def test_stopping_between_items():
    seen = []
    with Preemption(1) as preemption, pytest.raises(Preempted, match="SIGTERM"):
        for item in preemption.interruptible(range(5)):
            seen.append(item)
            if item == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [0, 1, 2]


def test_a_thread_that_is_not_the_main_one_goes_without_signals():
    """As in a notebook whose cells run in a worker thread."""
    found = []

    def poll():
        with Preemption(1) as preemption:
            preemption.start_poll()
            found.append(preemption.finish_poll())

    thread = threading.Thread(target=poll)
    thread.start()
    thread.join()
    assert found == [(None, False)]
