"""Where the time of a round goes: what each worker did with it, as the driver sees it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_NOTHING = 1e-9


@dataclass(frozen=True)
class Spent:
    """What the mean worker did with a round; the four parts, in seconds, add up to the round.

    Args:
        data: waited for episodes, by its own clock.
        compute: computed, by its own clock.
        transfer: held a lease without doing either: weights, gradients and messages packed and on their way, and
            answers that the driver was slow to hear; or held none while gradients were on their way to the server.
        wait: held no lease: for others, or because there was none.
        utilisation: the share in [0, 1] of the round that each worker computed, by its number.
    """

    data: float = 0.0
    compute: float = 0.0
    transfer: float = 0.0
    wait: float = 0.0
    utilisation: dict[int, float] = field(default_factory=dict)

    def budget(self, round_s: float, update_s: float) -> dict[str, Any]:
        """Where a step's time went, for its metrics: five parts in seconds, which add up to the step.

        ``data_s``, ``compute_s``, ``transfer_s`` and ``wait_s`` are of the mean worker, until the gradients are with
        the server. ``update_s`` is the driver's time for the update, in which workers wait, unless
        ``runtime.max_staleness`` lets them go on; of an all-reduce run the exchange of gradients and weights is in it.
        ``utilisation`` is the share of the step that each worker computed. Evaluations and checkpoints are in no step.

        Args:
            round_s: from the first lease to the last gradient.
            update_s: of the update after it.
        """
        share = round_s / max(round_s + update_s, _NOTHING)
        return {
            "data_s": self.data, "compute_s": self.compute, "transfer_s": self.transfer, "wait_s": self.wait,
            "update_s": update_s, "utilisation": {str(w): used * share for w, used in self.utilisation.items()},
        }  # fmt: skip


@dataclass
class _Hours:
    """One worker's seconds of a round: with a lease, and of those with data and computing."""

    busy: float = 0.0
    data: float = 0.0
    compute: float = 0.0
    moving: float = 0.0


class Timesheet:
    """Keeps the hours of workers that hold one lease at a time. Times are seconds of the driver's clock.

    A lease may be older than the round, or outlast it, where nobody waits: then what its worker says of it counts in
    proportion, and of one without an answer as the same worker's last one did.
    """

    def __init__(self) -> None:
        self._from = self._moved = 0.0
        self._lent: dict[int, float] = {}
        self._hours: dict[int, _Hours] = {}
        self._usual: dict[int, tuple[float, float]] = {}

    def begin(self, now: float) -> None:
        """A round begins."""
        self._from, self._moved, self._hours = now, 0.0, {}

    def lent(self, worker: int, now: float) -> None:
        """A worker is given a lease."""
        self._lent[worker] = now

    def answered(self, worker: int, now: float, data_s: float, compute_s: float) -> None:
        """It is answered, after so many seconds of waiting for data and of computing."""
        since = self._lent.pop(worker, now)
        whole = max(now - since, data_s + compute_s, _NOTHING)
        self._usual[worker] = data_s / whole, compute_s / whole
        self._note(worker, since, now)

    def gone(self, worker: int) -> None:
        """A worker is no longer there, nor what it held."""
        for kept in (self._lent, self._hours, self._usual):
            kept.pop(worker, None)  # type: ignore[attr-defined]

    def moved(self, start: float, end: float) -> None:
        """Gradients were on their way to the server for so long, as far as the driver waited for it."""
        self._moved += end - start
        for worker in self._lent:
            self._hours.setdefault(worker, _Hours()).moving += end - start

    def close(self, now: float, workers: Iterable[int]) -> Spent:
        """What became of the round, which ends.

        Args:
            now: its end.
            workers: those that are there.
        """
        for worker, since in self._lent.items():
            self._note(worker, since, now)
        whole = max(now - self._from, _NOTHING)
        there = {worker: self._hours.get(worker, _Hours()) for worker in workers}
        if not there:
            return Spent(wait=whole)
        mean = _Hours(*(sum(values) / len(there) for values in zip(*(vars(h).values() for h in there.values()))))
        wait = max(0.0, whole - mean.busy - (self._moved - mean.moving))
        transfer = max(0.0, whole - mean.data - mean.compute - wait)
        return Spent(
            mean.data, mean.compute, transfer, wait, {w: min(1.0, h.compute / whole) for w, h in there.items()}
        )

    def _note(self, worker: int, since: float, now: float) -> None:
        """Counts what of a lease lies in this round."""
        busy = max(0.0, now - max(since, self._from))
        data, compute = self._usual.get(worker, (0.0, 1.0))
        hours = self._hours.setdefault(worker, _Hours())
        hours.busy += busy
        hours.data += busy * data
        hours.compute += busy * compute
