"""Which worker computes which microbatches: decisions as values, without clock, process or network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from metadist.worker import Lease, Round


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
        waiting = self._waiting()
        parts = (shares or equal_shares)(len(waiting), idle)
        dealt: list[tuple[int, Lease]] = []
        owed = 0
        for worker, share in zip(idle, parts, strict=True):
            owed += share
            if waiting and owed:
                run = _leading_run(waiting)[:owed]
                waiting, owed = waiting[len(run) :], owed - len(run)
                dealt.append((worker, self._lend(worker, run, now)))
        return dealt

    def deal_again(
        self, idle: Sequence[int], now: float, patience: Callable[[Lease], float]
    ) -> list[tuple[int, Lease]]:
        """Second leases, to idle workers, of what others have held for ``patience(lease)`` seconds."""
        dealt: list[tuple[int, Lease]] = []
        twice = {m for held in self._leased.values() for m in self._open(held.lease) if self._holders(m) > 1}
        late = sorted(
            (h for h in self._leased.values() if now - h.since >= patience(h.lease)),
            key=lambda h: (h.since, h.lease.number),
        )
        workers = list(idle)
        for held in late:
            missing = [m for m in self._open(held.lease) if m not in twice]
            if missing and workers:
                run = _leading_run(missing)
                twice.update(run)
                worker = workers.pop(0)
                dealt.append((worker, self._lend(worker, run, now)))
                self.releases += 1
        return dealt

    def held(self) -> list[tuple[int, Lease, float]]:
        """Who holds which lease since when, in order of the leases' numbers."""
        return [(h.worker, h.lease, h.since) for h in self._leased.values()]

    def complete(self, lease: Lease) -> bool:
        """Notes a lease's answer; False if it was not of this round or everything in it was done."""
        self._leased.pop(lease.number, None)
        if lease.round != self.round:
            return False
        fresh = set(range(lease.start, lease.stop)) - self._done
        self._done |= fresh
        return bool(fresh)

    def reopen(self, lease: Lease) -> None:
        """What a lease gave was lost: its microbatches are waiting again."""
        self._done -= set(range(lease.start, lease.stop))

    def lose(self, worker: int) -> int:
        """Takes back what a lost worker held; returns how many microbatches are waiting again."""
        before = len(self._waiting())
        for number in [n for n, h in self._leased.items() if h.worker == worker]:
            del self._leased[number]
        lost = len(self._waiting()) - before
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
        return lease

    def _waiting(self) -> list[int]:
        leased = {m for h in self._leased.values() for m in self._open(h.lease)}
        return [m for m in range(self.round.microbatches) if m not in self._done and m not in leased]

    def _open(self, lease: Lease) -> list[int]:
        return [m for m in range(lease.start, lease.stop) if m not in self._done]

    def _holders(self, microbatch: int) -> int:
        return sum(h.lease.start <= microbatch < h.lease.stop for h in self._leased.values())


def equal_shares(microbatches: int, workers: Sequence[int]) -> list[int]:
    """As equal as can be, the larger shares first."""
    return [-(-(microbatches - i) // len(workers)) for i in range(len(workers))]


def _leading_run(numbers: Sequence[int]) -> Sequence[int]:
    """The consecutive numbers at the start of a sorted sequence."""
    n = 1
    while n < len(numbers) and numbers[n] == numbers[n - 1] + 1:
        n += 1
    return numbers[:n]
