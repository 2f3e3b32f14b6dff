"""Asynchronous updates as decisions: what is computed next, which answers count, and for how much.

Microbatches are numbered over the whole run, as they would follow one another in a synchronous one: with M in a
meta-batch, number *g* is microbatch ``g % M`` of meta-batch ``g // M``. A worker computes the next one with the newest
weights there are, its *base* version; an update is made as soon as enough answers have come. An answer's staleness is
the server's version less its base. What is too old is computed once more, with newer weights: nothing is left out.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Weighting = Literal["constant", "inverse"]


def weight_of(staleness: int, weighting: Weighting) -> float:
    """What a gradient counts for beside the others of its update: 1, or ``1 / (1 + staleness)``.

    The second is after Zhang et al. 2016, "Staleness-aware async-SGD for distributed deep learning", equation 6, where
    a gradient's rate is divided by its staleness; here an update stays a mean.
    """
    return 1.0 if weighting == "constant" else 1.0 / (1.0 + staleness)


@dataclass(frozen=True)
class Applied:
    """One microbatch of an update.

    Args:
        slot: its place in the sum.
        microbatch: its number in the run.
        base: the version it was computed with.
        weight: what its gradient was multiplied by.
    """

    slot: int
    microbatch: int
    base: int
    weight: float = 1.0


class Flow:
    """The microbatches of an asynchronous run, and the update that is being gathered.

    Args:
        total: microbatches of the whole run.
        per_update: answers that make an update.
        max_staleness: versions by which an answer may lag when it is applied.
        weighting: see :func:`weight_of`.
        state: of an earlier part of the run, see :meth:`state`.

    ``dropped`` lists (microbatch, base) of the answers that came too late for this update or those before it, since
    :meth:`committed` was last called.
    """

    def __init__(
        self,
        total: int,
        per_update: int,
        max_staleness: int,
        weighting: Weighting = "constant",
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if per_update < 1:
            raise ValueError(f"an update needs at least one microbatch, not {per_update}")
        self.total, self.per_update = total, per_update
        self.max_staleness, self.weighting = max_staleness, weighting
        self.applied: list[Applied] = []
        self.dropped: list[tuple[int, int]] = []
        self._next = int(state["next"]) if state else 0
        self._waiting: list[int] = sorted(state["open"]) if state else []
        self._leased: set[int] = set()

    @property
    def full(self) -> bool:
        """Whether the update has all it needs."""
        return len(self.applied) >= self.per_update

    def take(self) -> int | None:
        """The number of the microbatch to compute next; None if all are done or being computed."""
        if self._waiting:
            number = heapq.heappop(self._waiting)
        elif self._next < self.total:
            number, self._next = self._next, self._next + 1
        else:
            return None
        self._leased.add(number)
        return number

    def give_back(self, numbers: Iterable[int]) -> None:
        """Microbatches whose worker is gone."""
        for number in numbers:
            self._leased.remove(number)
            heapq.heappush(self._waiting, number)

    def answer(self, microbatch: int, base: int, version: int) -> Applied | None:
        """Judges an answer at the moment it would be applied.

        Args:
            microbatch: its number.
            base: the version it was computed with.
            version: the server's; it must not change before the update is made.

        Returns:
            Its place in the update; None if it is too old, and will be computed again.
        """
        if self.full:
            raise ValueError("the update is full")
        staleness = version - base
        if staleness > self.max_staleness:
            self.dropped.append((microbatch, base))
            self.give_back([microbatch])
            return None
        slot = min(set(range(self.per_update)) - {a.slot for a in self.applied})
        found = Applied(slot, microbatch, base, weight_of(staleness, self.weighting))
        self.applied.append(found)
        return found

    def reopen(self, microbatch: int) -> None:
        """What was to be applied was lost: its place is free, and it will be computed again."""
        self.applied = [a for a in self.applied if a.microbatch != microbatch]
        self.give_back([microbatch])

    def committed(self) -> None:
        """The update is made; the next one is begun."""
        self._leased -= {a.microbatch for a in self.applied}
        self.applied, self.dropped = [], []

    def state(self) -> dict[str, Any]:
        """What to go on from: what no update has been made of yet is open, whoever holds it."""
        return {"next": self._next, "open": sorted({*self._waiting, *self._leased})}
