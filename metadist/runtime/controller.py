"""One round after another: lease, collect, commit. Knows no Ray, no files, no trackers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from metadist.errors import ClusterError, NonFiniteError
from metadist.runtime.backend import Backend, Computed, Died, Event
from metadist.runtime.leases import Ledger
from metadist.runtime.pace import Pace
from metadist.worker import Lease, Report, Round

_POLL_S, _LEAST_S = 1.0, 0.001
_ALONE_S = 300.0


@dataclass
class RoundResult:
    """What a finished round gave.

    Args:
        round: the round.
        metrics: per-episode arrays, ``[tasks]`` each, in the order of the episodes.
        worker_s: seconds each worker computed, by its number.
        data_wait_s: seconds workers waited for episodes, the longest of them.
        memory: bytes by which a worker's memory grew so far, the most of them.
        programs: how many times a worker has traced or compiled something so far, the most of them.
        seconds: from the first lease to the last answer.
    """

    round: Round
    metrics: dict[str, np.ndarray]
    worker_s: dict[int, float] = field(default_factory=dict)
    data_wait_s: float = 0.0
    memory: int = 0
    programs: int = 0
    seconds: float = 0.0


class Controller:
    """Drives rounds over a backend.

    Args:
        backend: where workers and server live.
        lease_timeout_s: after how much silence a worker is taken to hang, and replaced (:class:`Pace`).
        on_event: told of every death and arrival, in words.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        backend: Backend,
        lease_timeout_s: float = 300.0,
        on_event: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.backend, self.on_event, self.clock = backend, on_event, clock
        self.pace = Pace(lease_timeout_s)
        self.releases = 0
        self._next_lease = 0
        self._asked: dict[int, tuple[Lease, float]] = {}

    def run(self, round: Round) -> RoundResult:
        """Computes every microbatch of a round, whoever dies on the way.

        Raises:
            NonFiniteError: a loss or gradient is not finite; nothing was committed.
            ClusterError: no worker is left and none comes.
        """
        self.begin(round)
        return self.finish()

    def begin(self, round: Round) -> None:
        """Gives out a round's first leases; :meth:`finish` must follow."""
        self._ledger = Ledger(round, self._next_lease)
        self._started = self.clock()
        self._reports: dict[int, tuple[int, Report]] = {}
        self._lend()

    def finish(self) -> RoundResult:
        """Waits until the round that was begun is done."""
        ledger = self._ledger
        self._alone_since: float | None = None
        while not ledger.finished:
            self._mind_absence()
            for event in self.backend.wait(self._until_late()):
                self._heard(event)
            self._dismiss_silent()
            self._lend()
        self._next_lease = ledger.next_number
        self.pace.pass_over(ledger.round.kind, [w for w in self.backend.workers() if w not in ledger.lent])
        self.releases += ledger.releases
        return self._result()

    def _mind_absence(self) -> None:
        """Says once that no worker is left, and gives up when none comes."""
        now = self.clock()
        if self.backend.workers():
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
            self.on_event("no worker is left; waiting for a new one")
        elif now - self._alone_since > _ALONE_S:
            raise no_workers(now - self._alone_since)

    def _lend(self) -> None:
        now, kind = self.clock(), self._ledger.round.kind
        idle = self.backend.idle()
        leases = self._ledger.deal(idle, now, functools.partial(self.pace.shares, kind))
        taken = {worker for worker, _ in leases}
        spare = [w for w in idle if w not in taken]
        for worker, lease in leases + self._ledger.deal_again(spare, now, self._patience):
            self._asked[worker] = lease, now
            self.backend.lease(worker, lease)

    def _patience(self, lease: Lease) -> float:
        return self.pace.patience(lease.round.kind, lease.stop - lease.start)

    def _until_late(self) -> float:
        """Seconds to wait for news: no longer than until somebody idle could take over from somebody late."""
        if not self.backend.idle():
            return _POLL_S
        now = self.clock()
        late = [since + self._patience(lease) - now for _, lease, since in self._ledger.held()]
        return max(_LEAST_S, min([_POLL_S, *(s for s in late if s > -_LEAST_S)]))

    def _dismiss_silent(self) -> None:
        """Dismisses workers that hold a lease, of this round or an earlier one, for too long."""
        now = self.clock()
        for worker, (lease, since) in list(self._asked.items()):
            if now - since > self.pace.end_of_patience(lease.round.kind, worker):
                self._heard(self.backend.dismiss(worker, f"silent for {now - since:.0f} s"))

    def _heard(self, event: Event) -> None:
        if isinstance(event, Computed):
            self._computed(event)
        elif isinstance(event, Died):
            lost = self._ledger.lose(event.worker)
            self.pace.forget(event.worker)
            self._asked.pop(event.worker, None)
            self.on_event(f"worker {event.worker} died ({event.reason}); {lost} microbatches go to others")
        else:
            self.on_event(f"worker {event.worker} joined")

    def _computed(self, event: Computed) -> None:
        report = event.report
        lease, since = self._asked.pop(event.worker, (None, 0.0))
        if lease is not None:
            self.pace.note(lease.round.kind, event.worker, lease.stop - lease.start, self.clock() - since)
        fresh = self._ledger.complete(report.lease)
        if not fresh:
            return
        if report.bad_tasks:
            raise _not_finite(report)
        for m in range(report.lease.start, report.lease.stop):
            self._reports.setdefault(m, (event.worker, report))

    def _result(self) -> RoundResult:
        round = self._ledger.round
        pieces: dict[str, list[np.ndarray]] = {}
        for m in range(round.microbatches):
            report = self._reports[m][1]
            size = round.tasks_per_microbatch
            at = (m - report.lease.start) * size
            for name, values in report.metrics.items():
                pieces.setdefault(name, []).append(values[at : at + len(round.episodes(m))])
        result = RoundResult(round, {k: np.concatenate(v) for k, v in pieces.items()})
        result.seconds = self.clock() - self._started
        for worker, report in {id(r): (w, r) for w, r in self._reports.values()}.values():
            result.worker_s[worker] = result.worker_s.get(worker, 0.0) + report.compute_s
            result.data_wait_s = max(result.data_wait_s, report.data_wait_s)
            result.memory = max(result.memory, report.memory)
            result.programs = max(result.programs, report.programs)
        return result


def _not_finite(report: Report) -> NonFiniteError:
    shown = ", ".join(map(str, report.bad_tasks[:8])) + (" ..." if len(report.bad_tasks) > 8 else "")
    kind = "training" if report.lease.round.kind == "train" else "evaluation"
    return NonFiniteError(
        f"step {report.lease.round.version + 1}",
        f"the loss or gradient of {kind} episodes {shown} of split {report.lease.round.split} is not finite; "
        "no update was made of it",
        "lower algorithm.inner_lr or outer.lr, set outer.clip_norm, or look for broken data in those episodes",
    )


def means(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each metric over its episodes."""
    return {k: float(v.mean()) for k, v in metrics.items()}


def no_workers(waited_s: float) -> ClusterError:
    """The error of a run that has nobody left to compute."""
    return ClusterError(
        "runtime", f"no worker became ready in {waited_s:.0f} s", "look at the cluster with `ray status`"
    )
