"""Calls into the core that Ctrl-C ends early."""

import os
import signal
import threading
import time

import pytest
from moetuner.solver.joint import interruptible
from moetuner.solver.joint.interruptible import Interruptible


def press_and_wait_for_stop(stop):
    time.sleep(0.3)  # until the main thread waits
    os.kill(os.getpid(), signal.SIGINT)
    while not stop[0]:
        time.sleep(0.01)
    time.sleep(0.3)  # a core looks at `stop` now and then
    return "what it had"


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises, also where whoever started the tests had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_the_call_and_waits_for_what_it_has():
    runner = Interruptible()
    assert runner.run(press_and_wait_for_stop) == "what it had"
    assert runner.interrupted


@pytest.mark.usefixtures("ctrl_c")
def test_after_ctrl_c_nobody_waits_for_what_nothing_stops(monkeypatch):
    monkeypatch.setattr(interruptible, "LAST_SECONDS", 0.0)
    runner, never = Interruptible(), threading.Event()
    pressed = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    pressed.start()
    assert runner.in_time(never.wait) is None
    assert runner.interrupted
    assert runner.in_time(lambda: never.wait() or "late") is None
    never.set()


def test_in_time_a_call_ends_by_itself():
    runner = Interruptible()
    assert runner.in_time(lambda: "a value") == "a value"
    with pytest.raises(ZeroDivisionError):
        runner.in_time(lambda: 1 // 0)


def test_an_error_of_the_call_comes_through():
    runner = Interruptible()
    with pytest.raises(ZeroDivisionError):
        runner.run(lambda stop: 1 // int(stop[0]))
    assert not runner.interrupted
