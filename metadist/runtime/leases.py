"""Which worker computes which microbatches: decisions as values, without clock, process or network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from metadist.rounds import Lease, Round


@dataclass
class _Held:
    lease: Lease
    worker: int
    since: float


Shares = Callable[[int, Sequence[int]], Sequence[int]]


class Ledger:
    """The leases of one round.

    A microbatch is *waiting*, *leased* (perhaps twice) or *done*. Nothing that is decided here changes
    the result: only who computes it and when.

    Args:
        round: the work.
        first_number: number of the first lease given out.
        quorum: the part of the microbatches that is enough.

    ``lent`` holds everybody who got a lease.
    """

    def __init__(self, round: Round, first_number: int = 0, quorum: float = 1.0) -> None:
        self.round = round
        self._enough = max(1, math.ceil(round.microbatches * quorum - 1e-9))
        self.next_number = first_number
        self.releases = 0
        self.lent: set[int] = set()
        self._done: set[int] = set()
        self._leased: dict[int, _Held] = {}
        # Kept up to date rather than looked for: with thousands of workers every answer would look through all leases.
        self._holders = [0] * round.microbatches
        self._waiting = set(range(round.microbatches))
        self._sizes: Counter[int] = Counter()

    @property
    def finished(self) -> bool:
        """Whether enough microbatches are done: all of them, unless there is a quorum."""
        return len(self._done) >= self._enough

    def deal(self, idle: Sequence[int], now: float, shares: Shares | None = None) -> list[tuple[int, Lease]]:
        """Leases of what is waiting, in consecutive shares to the workers that are idle.

        Args:
            idle: the workers.
            now: seconds.
            shares: ``shares(microbatches, workers)`` says how many each gets; None: equally many.
        """
        if not self._waiting:
            return []
        waiting: Sequence[int] = sorted(self._waiting)
        parts = (shares or equal_shares)(len(waiting), idle)
        dealt: list[tuple[int, Lease]] = []
        owed = 0
        for worker, share in zip(idle, parts, strict=True):
            owed += share
            if waiting and owed:
                run = _leading_run(waiting[:owed])
                waiting, owed = waiting[len(run) :], owed - len(run)
                dealt.append((worker, self._lend(worker, run, now)))
        return dealt

    def deal_again(
        self, idle: Sequence[int], now: float, patience: Callable[[Lease], float]
    ) -> list[tuple[int, Lease]]:
        """Second leases, to idle workers, of what others have held for ``patience(lease)`` seconds.

        Patience is the same for leases of as many microbatches.
        """
        dealt: list[tuple[int, Lease]] = []
        if not idle:
            return dealt
        late = [h for h, left in self._until_late(now, patience) if left <= 0.0]
        late.sort(key=lambda h: (h.since, h.lease.number))
        workers = list(idle)
        for held in late:
            missing = [m for m in self._open(held.lease) if self._holders[m] < 2]
            if missing and workers:
                run = _leading_run(missing)
                worker = workers.pop(0)
                dealt.append((worker, self._lend(worker, run, now)))
                self.releases += 1
        return dealt

    def next_late(self, now: float, patience: Callable[[Lease], float], grace: float) -> float:
        """Seconds until a lease is late that has not been so for longer than ``grace``; infinity if there is none."""
        return min((left for _, left in self._until_late(now, patience, grace) if left > -grace), default=math.inf)

    def _until_late(
        self, now: float, patience: Callable[[Lease], float], grace: float = 0.0
    ) -> Iterator[tuple[_Held, float]]:
        """Seconds until leases are late: of those that are, by more than ``grace``, and the next of each size."""
        limits: dict[int, float] = {}
        sizes = {size for size, leases in self._sizes.items() if leases}
        for held in self._leased.values():  # the oldest first
            size = held.lease.stop - held.lease.start
            if size not in sizes:
                continue
            if size not in limits:
                limits[size] = patience(held.lease)
            left = held.since + limits[size] - now
            if left > -grace:
                sizes.discard(size)
            yield held, left
            if not sizes:
                return

    def complete(self, lease: Lease) -> bool:
        """Notes a lease's answer; False if it was not of this round or everything in it was done."""
        self._take_back(lease.number)
        if lease.round != self.round:
            return False
        fresh = set(range(lease.start, lease.stop)) - self._done
        self._done |= fresh
        self._waiting -= fresh
        return bool(fresh)

    def reopen(self, lease: Lease) -> None:
        """What a lease gave was lost: its microbatches are waiting again."""
        again = set(range(lease.start, lease.stop)) & self._done
        self._done -= again
        self._waiting |= {m for m in again if not self._holders[m]}

    def lose(self, worker: int) -> int:
        """Takes back what a lost worker held; returns how many microbatches are waiting again."""
        before = len(self._waiting)
        for number in [n for n, h in self._leased.items() if h.worker == worker]:
            self._take_back(number)
        lost = len(self._waiting) - before
        self.releases += bool(lost)
        return lost

    def busy(self) -> set[int]:
        """Workers that hold a lease."""
        return {h.worker for h in self._leased.values()}

    def _lend(self, worker: int, run: Sequence[int], now: float) -> Lease:
        lease = Lease(self.next_number, self.round, run[0], run[-1] + 1)
        self.next_number += 1
        self._leased[lease.number] = _Held(lease, worker, now)
        self.lent.add(worker)
        self._sizes[len(run)] += 1
        for m in range(lease.start, lease.stop):
            self._holders[m] += 1
            self._waiting.discard(m)
        return lease

    def _take_back(self, number: int) -> None:
        held = self._leased.pop(number, None)
        if held is not None:
            self._sizes[held.lease.stop - held.lease.start] -= 1
            for m in range(held.lease.start, held.lease.stop):
                self._holders[m] -= 1
                if not self._holders[m] and m not in self._done:
                    self._waiting.add(m)

    def _open(self, lease: Lease) -> list[int]:
        return [m for m in range(lease.start, lease.stop) if m not in self._done]


def equal_shares(microbatches: int, workers: Sequence[int]) -> list[int]:
    """As equal as can be, the larger shares first."""
    return [-(-(microbatches - i) // len(workers)) for i in range(len(workers))]


def _leading_run(numbers: Sequence[int]) -> Sequence[int]:
    """The consecutive numbers at the start of a sorted sequence."""
    n = 1
    while n < len(numbers) and numbers[n] == numbers[n - 1] + 1:
        n += 1
    return numbers[:n]
