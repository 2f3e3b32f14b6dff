"""How long workers take, learned from their answers: decides who gets how much and when somebody is late."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from statistics import median

_WEIGHT = 0.5
_FADE = 0.1
_LATE = 2.0
_JITTER_S = 0.02
_FIRST = 6.0


class Pace:
    """Seconds a microbatch, of each worker and of all.

    A worker's first answer counts for nothing: it loads, traces and compiles.

    Args:
        timeout_s: silence after which a worker is taken to hang, whatever the others do. It has six times as long for
            its first answer.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._seconds: dict[tuple[str, int], float] = {}
        self._answered: set[tuple[str, int]] = set()
        self._typical: dict[str, float | None] = {}  # asked for at every lease that is looked at

    def note(self, kind: str, worker: int, microbatches: int, seconds: float) -> None:
        """Takes an answer into account.

        Args:
            kind: of the round: training and evaluation differ.
            worker: who answered.
            microbatches: how many were computed.
            seconds: from the lease to the answer.
        """
        if (kind, worker) not in self._answered:
            self._answered.add((kind, worker))
            return
        new = seconds / microbatches
        old = self._seconds.get((kind, worker), new)
        self._seconds[kind, worker] = old + _WEIGHT * (new - old)
        self._typical.pop(kind, None)

    def forget(self, worker: int) -> None:
        """A worker is gone."""
        for kind in ("train", "evaluate"):
            self._answered.discard((kind, worker))
            self._seconds.pop((kind, worker), None)
            self._typical.pop(kind, None)

    def pass_over(self, kind: str, workers: Sequence[int]) -> None:
        """These got no lease of a round: what is known of them fades, so that they are tried again some time."""
        typical = self.typical(kind)
        for worker in workers:
            if typical is not None and (kind, worker) in self._seconds:
                self._seconds[kind, worker] += _FADE * (typical - self._seconds[kind, worker])
        self._typical.pop(kind, None)

    def typical(self, kind: str) -> float | None:
        """Seconds of a microbatch, the median over the workers; None while nothing is known."""
        if kind not in self._typical:
            known = [s for (k, _), s in self._seconds.items() if k == kind]
            self._typical[kind] = median(known) if known else None
        return self._typical[kind]

    def shares(self, kind: str, microbatches: int, workers: Sequence[int]) -> list[int]:
        """How many microbatches each worker gets for the last of them to be done soonest."""
        usual = self.typical(kind) or 1.0
        pace = [self._seconds.get((kind, w), usual) for w in workers]
        shares = [0] * len(workers)
        done = [(pace[i], i) for i in range(len(workers))]
        heapq.heapify(done)
        for _ in range(microbatches if workers else 0):
            _, i = done[0]
            shares[i] += 1
            heapq.heapreplace(done, ((shares[i] + 1) * pace[i], i))
        return shares

    def patience(self, kind: str, microbatches: int) -> float:
        """Seconds after which a lease is late enough to be given to somebody else as well."""
        typical = self.typical(kind)
        return self.timeout_s if typical is None else min(self.timeout_s, _LATE * typical * microbatches + _JITTER_S)

    def end_of_patience(self, kind: str, worker: int) -> float:
        """Seconds of silence after which ``worker`` is taken to hang."""
        return self.timeout_s * (1.0 if (kind, worker) in self._answered else _FIRST)
