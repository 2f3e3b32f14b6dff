"""Reading ahead in a background thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Channel(Generic[T]):
    """What reader and thread share; it does not know the reader, so that a forgotten reader is collected."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.changed = threading.Condition()
        self.items: deque[T] = deque()
        self.error: BaseException | None = None
        self.ended = False
        self.stopped = False

    def fill(self, source: Iterable[T]) -> None:
        """Moves items until the source ends or fails, or the reader stops."""
        iterator: Any = None
        try:
            iterator = iter(source)
            for item in iterator:
                with self.changed:
                    self.changed.wait_for(lambda: self.stopped or len(self.items) < self.depth)
                    if self.stopped:
                        return
                    self.items.append(item)
                    self.changed.notify_all()
        except BaseException as e:
            self.error = e  # raised again where the item would have come
        finally:
            if hasattr(iterator, "close"):
                iterator.close()  # a generator lets go of its files in the thread that ran it
            with self.changed:
                self.ended = True
                self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.items.clear()
            self.changed.notify_all()


class Prefetch(Iterator[T]):
    """Iterates over ``source`` in a thread, up to ``depth`` items ahead, in the same order.

    An error of the source is raised by the ``next()`` whose item it would have been; items before it come
    first. ``close()`` (or the end of a ``with`` block) stops the thread; it waits for an item being made.

    Args:
        source: what to read; only the thread touches it.
        depth: items kept ready, at least 1.
    """

    def __init__(self, source: Iterable[T], depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        self._channel: _Channel[T] = _Channel(depth)
        self._thread = threading.Thread(
            target=self._channel.fill, args=(source,), name="metadist-prefetch", daemon=True
        )
        self._thread.start()

    def __next__(self) -> T:
        channel = self._channel
        with channel.changed:
            channel.changed.wait_for(lambda: channel.items or channel.ended or channel.stopped)
            if channel.items:
                item = channel.items.popleft()
                channel.changed.notify_all()
                return item
            error, channel.error = channel.error, None
            if error is not None and not channel.stopped:
                raise error
        raise StopIteration

    def close(self) -> None:
        """Stops the thread and waits for it (at most five seconds, if its source hangs)."""
        self._channel.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_channel"):
            self._channel.stop()
