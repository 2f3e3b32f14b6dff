"""Reading ahead keeps order, carries errors, and stops when told."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from metadist.data import Prefetch


def test_order_is_kept_and_the_end_comes() -> None:
    assert list(Prefetch(range(100), depth=3)) == list(range(100))


def test_an_error_comes_where_its_item_would_have() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    ahead = Prefetch(source(), depth=8)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)


def test_it_reads_no_further_ahead_than_asked() -> None:
    made: list[int] = []
    ready = threading.Event()

    def source() -> Iterator[int]:
        for i in itertools.count():
            made.append(i)
            if i == 4:
                ready.set()
            yield i

    with Prefetch(source(), depth=3) as ahead:
        next(ahead)
        assert ready.wait(5)
        time.sleep(0.05)
        assert len(made) == 5  # one taken, three ready, one in hand


def test_close_stops_the_thread_and_the_source() -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.set()

    ahead = Prefetch(source(), depth=2)
    next(ahead)
    start = time.monotonic()
    ahead.close()
    assert closed.is_set() and not ahead._thread.is_alive() and time.monotonic() - start < 1
    with pytest.raises(StopIteration):
        next(ahead)


def test_a_forgotten_reader_does_not_leave_its_thread() -> None:
    ahead = Prefetch(itertools.count(), depth=2)
    thread = ahead._thread
    del ahead
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_depth_must_be_positive() -> None:
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        Prefetch([], depth=0)
