"""A virtual clock, what is to happen at its times, and things that several share or that do one thing at a time."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from functools import partial

Then = Callable[[], None]


class Events:
    """What is to happen, by time; ``now`` is in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Then]] = []
        self._number = 0

    def at(self, when: float, then: Then) -> None:
        """Has something happen at ``when``, not in the past; of what happens at one time, first what was said first."""
        self._number += 1
        heapq.heappush(self._queue, (when, self._number, then))

    def run(self, until: Callable[[], bool], deadline: float = math.inf) -> None:
        """Lets time pass until something is so, or until ``deadline``.

        Raises:
            RuntimeError: nothing is left to happen, and there is no deadline.
        """
        while not until():
            if not self._queue or self._queue[0][0] > deadline:
                if math.isinf(deadline):
                    raise RuntimeError("the simulation stands still: it waits for something that will never happen")
                self.now = max(self.now, deadline)
                return
            when, _, then = heapq.heappop(self._queue)
            self.now = max(self.now, when)
            then()


class Shared:
    """Cores, or a memory's bandwidth: each job goes at full speed while there are no more than ``capacity`` of them.

    More share it evenly, as processes that are awake share a machine's cores.

    Args:
        events: the clock.
        capacity: jobs at full speed.
    """

    def __init__(self, events: Events, capacity: float) -> None:
        self._events, self._capacity = events, capacity
        # Of each job, how far the work done for every one of them has to come for it to be finished.
        self._jobs: list[tuple[float, int, Then]] = []
        self._done_for_each, self._since = 0.0, 0.0
        self._number = self._planned = 0

    def submit(self, seconds: float, then: Then) -> None:
        """A job of so many seconds at full speed, and what follows it."""
        if seconds <= 0.0:
            self._events.at(self._events.now, then)
            return
        self._pass_time()
        self._number += 1
        heapq.heappush(self._jobs, (self._done_for_each + seconds, self._number, then))
        self._plan()

    @property
    def _speed(self) -> float:
        return min(1.0, self._capacity / len(self._jobs))

    def _pass_time(self) -> None:
        if self._jobs:
            self._done_for_each += (self._events.now - self._since) * self._speed
        else:
            self._done_for_each = 0.0
        self._since = self._events.now

    def _plan(self) -> None:
        """Plans the end of the job that is the next to end, in place of what was planned."""
        self._planned += 1
        if self._jobs:
            left = max(0.0, self._jobs[0][0] - self._done_for_each)
            self._events.at(self._events.now + left / self._speed, partial(self._ended, self._planned))

    def _ended(self, planned: int) -> None:
        if planned != self._planned:
            return
        self._pass_time()
        self._done_for_each, _, then = heapq.heappop(self._jobs)
        self._plan()
        then()


class Process:
    """Does one thing after the other: first what takes a core, then what takes the memory.

    Args:
        cores, memory: of its node.
    """

    def __init__(self, cores: Shared, memory: Shared) -> None:
        self._cores, self._memory = cores, memory
        self._waiting: deque[tuple[float, float, Then]] = deque()
        self._busy = False

    def submit(self, cpu_s: float, memory_s: float, then: Then) -> None:
        """Something to do after all that was asked before.

        Args:
            cpu_s: of a core, alone.
            memory_s: of reading and writing, alone.
            then: what follows.
        """
        self._waiting.append((cpu_s, memory_s, then))
        if not self._busy:
            self._next()

    def _next(self) -> None:
        self._busy = bool(self._waiting)
        if self._busy:
            cpu_s, memory_s, then = self._waiting.popleft()
            self._cores.submit(cpu_s, lambda: self._memory.submit(memory_s, partial(self._finish, then)))

    def _finish(self, then: Then) -> None:
        self._next()
        then()


class Link:
    """A node's way to the network: what goes out is sent one after the other, and so is what comes in.

    Args:
        events: the clock.
        bytes_per_s: in each direction.
    """

    def __init__(self, events: Events, bytes_per_s: float) -> None:
        self._events, self._rate = events, bytes_per_s
        self._out = self._in = 0.0

    def send(self, other: Link, size: float, latency_s: float, then: Then) -> None:
        """Sends ``size`` bytes; what arrives can be received while the rest is still being sent."""
        takes = size / self._rate
        begins = max(self._events.now, self._out)
        self._out = begins + takes
        other._in = max(max(begins + latency_s, other._in) + takes, self._out + latency_s)
        self._events.at(other._in, then)
