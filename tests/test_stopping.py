"""Signals: noted during a step, at once outside of one or the second time, and never swallowed on the way."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from metadist.stopping import Interrupted, StopSignals


def test_a_first_signal_waits_for_the_step_and_a_second_does_not() -> None:
    with StopSignals() as stop:
        with stop.after_the_step():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signum == signal.SIGTERM
            with pytest.raises(Interrupted) as told:
                os.kill(os.getpid(), signal.SIGINT)
            assert told.value.signum == signal.SIGINT


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_outside_of_steps_the_first_one_is_at_once(signum: int) -> None:
    with StopSignals() as stop, pytest.raises(Interrupted) as told:
        with stop.after_the_step():
            pass
        os.kill(os.getpid(), signum)
    assert told.value.signum == signum and told.value.run_dir is None


def test_what_catches_every_error_does_not_catch_it() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignals():
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)


def test_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_signals_that_somebody_else_has_taken_meanwhile_are_taken_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        signal.signal(signal.SIGTERM, lambda *_: None)
        stop.listen()
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_leave_signals_alone() -> None:
    came: list[BaseException] = []

    def run() -> None:
        try:
            with StopSignals():
                pass
        except BaseException as e:
            came.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not came
