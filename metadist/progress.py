"""How far a long command is, said while it works."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

_T = TypeVar("_T")
_LIVE_S, _LINE_S = 0.1, 5.0


def counted(number: int, thing: str) -> str:
    """So many of a thing whose plural is regular, as ``1 worker``, ``2 workers``."""
    return f"{number} {thing}{'s' * (number != 1)}"


def left(seconds: float) -> str:
    """What is to come, as ``3:05 left``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} left"


class Progress:
    """A line that is rewritten on a terminal, one every five seconds elsewhere; nothing of what ends before that.

    Args:
        verb: what is being done, e.g. ``packing``.
        err: where it goes; None: ``sys.stderr``.
        clock: seconds, growing.
    """

    def __init__(self, verb: str, err: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._verb, self._err, self._clock = verb, err or sys.stderr, clock
        self._live = self._err.isatty()
        self._started = self._last = clock()
        self._spoke = False

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: int, total: int) -> None:
        """So many of so many are done."""
        now = self._clock()
        due = now - self._last >= (_LIVE_S if self._live else _LINE_S)
        if not due and not (done == total and self._spoke):
            return
        self._last, self._spoke = now, True
        text = f"{self._verb} {done:,} of {total:,}"
        if 0 < done < total:
            text += ", " + left((now - self._started) * (total - done) / done)
        self._err.write(f"\r\x1b[K{text}" if self._live else f"{text}\n")
        self._err.flush()

    def __exit__(self, *_: object) -> None:
        if self._live and self._spoke:
            self._err.write("\n")


def tracked(items: Iterable[_T], verb: str, total: int) -> Iterator[_T]:
    """``items``, one after another, with their progress."""
    with Progress(verb) as progress:
        for done, item in enumerate(items, 1):
            yield item
            progress(done, total)
