"""One round after another: lease, collect, commit. Knows no Ray, no files, no trackers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from metadist.errors import ClusterError, NonFiniteError
from metadist.rounds import Lease, Report, Round
from metadist.runtime.backend import Backend, Computed, Died, Event, Left, Moved
from metadist.runtime.leases import Ledger
from metadist.runtime.pace import Pace
from metadist.runtime.timesheet import Spent, Timesheet
from metadist.staleness import Applied

POLL_S, _LEAST_S = 1.0, 0.001
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
        spent: what workers did with them.
        gpus: what each worker last told of its GPU, by its number.
        tasks: what the mean gradient is taken over: the tasks there are, or the sum of their weights.
        applied: what the update is to be made of, if that is not every microbatch of the round at its version.
        dropped: (microbatch, base version) of answers that were too old.
        left_out: microbatches of the round that were not waited for.
    """

    round: Round
    metrics: dict[str, np.ndarray]
    worker_s: dict[int, float] = field(default_factory=dict)
    data_wait_s: float = 0.0
    memory: int = 0
    programs: int = 0
    seconds: float = 0.0
    spent: Spent = Spent()
    gpus: dict[int, dict[str, float]] = field(default_factory=dict)
    tasks: float = 0.0
    applied: list[Applied] = field(default_factory=list)
    dropped: list[tuple[int, int]] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)

    @property
    def slots(self) -> list[int] | None:
        """The places of the sum that are filled, if not all are."""
        return [a.slot for a in self.applied] if self.left_out else None

    @property
    def staleness(self) -> list[int]:
        """Versions by which each of ``applied`` lags."""
        return [self.round.version - a.base for a in self.applied]

    def note(self, worker: int, report: Report) -> None:
        """Takes the clock and the counters of one answer into account."""
        self.worker_s[worker] = self.worker_s.get(worker, 0.0) + report.compute_s
        self.data_wait_s = max(self.data_wait_s, report.data_wait_s)
        self.memory = max(self.memory, report.memory)
        self.programs = max(self.programs, report.programs)
        if report.gpu:
            self.gpus[worker] = report.gpu


class Controller:
    """Drives rounds over a backend.

    Args:
        backend: where workers and server live.
        lease_timeout_s: after how much silence a worker is taken to hang, and replaced (:class:`Pace`).
        on_event: told of every death and arrival, in words.
        clock: seconds, for tests.
        quorum: the part of a training round's microbatches with which it goes on; those that have not come by then
            are left out.
    """

    def __init__(
        self,
        backend: Backend,
        lease_timeout_s: float = 300.0,
        on_event: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.perf_counter,
        quorum: float = 1.0,
    ) -> None:
        self.backend, self.on_event, self.clock, self.quorum = backend, on_event, clock, quorum
        self.pace, self.timesheet = Pace(lease_timeout_s), Timesheet()
        self.releases = 0
        self._next_lease = 0
        self._asked: dict[int, tuple[Lease, float]] = {}
        self._first_lease = 0
        self._ledger = Ledger(Round("train", 0, "", "", 0, 0, 1))
        self.begun: Round | None = None

    def take_over(self, earlier: Controller) -> None:
        """Goes on in place of a controller whose update is given up: what it has asked for is no longer wanted.

        Its workers are known, and who is silent is still minded.
        """
        self.pace, self.releases, self.timesheet = earlier.pace, earlier.releases, earlier.timesheet
        there = self.backend.workers()
        self._asked = {worker: asked for worker, asked in earlier._asked.items() if worker in there}
        for worker in earlier._asked.keys() - self._asked.keys():
            self.timesheet.gone(worker)
        self._next_lease = self._first_lease = earlier._unused_lease()

    def _unused_lease(self) -> int:
        return max(self._next_lease, self._ledger.next_number)

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
        self.begun = round
        self._ledger = Ledger(round, self._next_lease, self.quorum if round.kind == "train" else 1.0)
        self.started = self.clock()
        self.timesheet.begin(self.started)
        self._reports: dict[int, tuple[int, Report]] = {}
        self._lend()

    def committed(self) -> None:
        """The update of the round that was finished is made."""

    def finish(self) -> RoundResult:
        """Waits until the round that was begun is done."""
        ledger = self._ledger
        self._alone_since: float | None = None
        while not ledger.finished or self._reopened():
            self._turn()
        self._next_lease = ledger.next_number
        self.pace.pass_over(ledger.round.kind, [w for w in self.backend.workers() if w not in ledger.lent])
        self.releases += ledger.releases
        return self._result()

    def _reopened(self) -> bool:
        """Whether gradients were lost on their way to the server, with their node, and are computed again."""
        before = self.clock()
        lost = self.backend.settle()
        self.timesheet.moved(before, self.clock())
        for lease in lost:
            self._reopen(lease)
        if lost:
            self.on_event(f"the gradients of {len(lost)} leases were lost with a node; they are computed again")
            self._lend()
        return bool(lost)

    def _reopen(self, lease: Lease) -> None:
        self._ledger.reopen(lease)
        for m in range(lease.start, lease.stop):
            self._reports.pop(m, None)

    def _turn(self) -> None:
        """Waits for news, and acts on it."""
        self._mind_absence()
        for event in self.backend.wait(self._until_late()):
            self._heard(event)
        self._dismiss_silent()
        self._lend()

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
        if self._ledger.finished:
            return
        now, kind = self.clock(), self._ledger.round.kind
        idle = self.backend.idle()
        leases = self._ledger.deal(idle, now, functools.partial(self.pace.shares, kind))
        taken = {worker for worker, _ in leases}
        spare = [w for w in idle if w not in taken] if taken else idle
        for worker, lease in leases + self._ledger.deal_again(spare, now, self._patience):
            self._ask(worker, lease, now)

    def _ask(self, worker: int, lease: Lease, now: float) -> None:
        self._asked[worker] = lease, now
        self.timesheet.lent(worker, now)
        self.backend.lease(worker, lease)

    def _patience(self, lease: Lease) -> float:
        return self.pace.patience(lease.round.kind, lease.stop - lease.start)

    def _until_late(self) -> float:
        """Seconds to wait for news: no longer than until somebody idle could take over from somebody late."""
        if not self.backend.idle():
            return POLL_S
        return max(_LEAST_S, min(POLL_S, self._ledger.next_late(self.clock(), self._patience, _LEAST_S)))

    def _dismiss_silent(self) -> None:
        """Dismisses workers that hold a lease, of this round or an earlier one, for too long."""
        now = self.clock()
        silent = []
        for worker, (lease, since) in self._asked.items():
            if now - since <= self.pace.timeout_s:
                break  # those after it were asked later
            if now - since > self.pace.end_of_patience(lease.round.kind, worker):
                silent.append((worker, now - since))
        for worker, seconds in silent:
            self._heard(self.backend.dismiss(worker, f"silent for {seconds:.0f} s"))

    def _heard(self, event: Event) -> None:
        if isinstance(event, Computed):
            self._computed(event)
        elif isinstance(event, Died):
            self._forget(event.worker)
            lost = self._lost(event.worker)
            self._asked.pop(event.worker, None)
            self.on_event(f"worker {event.worker} died ({event.reason}); {lost} microbatches go to others")
        elif isinstance(event, Left):
            self._forget(event.worker)
            self.on_event(f"worker {event.worker} left ({event.reason})")
        elif isinstance(event, Moved):
            self.on_event(f"{event.what} moved to another node ({event.reason})")
        else:
            self.on_event(f"worker {event.worker} joined")

    def _forget(self, worker: int) -> None:
        self.pace.forget(worker)
        self.timesheet.gone(worker)

    def _lost(self, worker: int) -> int:
        """Takes back what a worker held; returns how many microbatches are to be computed by others."""
        return self._ledger.lose(worker)

    def _computed(self, event: Computed) -> None:
        lease, since = self._asked.pop(event.worker, (None, 0.0))
        if lease is not None:
            now, report = self.clock(), event.report
            self.pace.note(lease.round.kind, event.worker, lease.stop - lease.start, now - since)
            self.timesheet.answered(event.worker, now, report.data_wait_s, report.compute_s)
        if lease is None or lease.number != event.report.lease.number:
            return  # heard of already
        if lease.number < self._first_lease:
            self.backend.drop(lease)
            return
        self._answered(event.worker, event.report)

    def _answered(self, worker: int, report: Report) -> None:
        lease, round = report.lease, self._ledger.round
        finished, fresh = self._ledger.finished, self._ledger.complete(lease)
        if finished or not fresh:
            self.backend.drop(lease)
            return
        if report.bad_tasks:
            raise not_finite(report)
        if round.kind == "train":
            self._accept(lease, round.version, round.microbatches)
        for m in range(lease.start, lease.stop):
            self._reports.setdefault(m, (worker, report))

    def _accept(self, lease: Lease, version: int, count: int, *place: Any) -> None:
        before = self.clock()
        self.backend.accept(lease, version, count, *place)
        self.timesheet.moved(before, self.clock())

    def _clocked(self, result: RoundResult) -> RoundResult:
        """The result with how long the round took, which ends now."""
        now = self.clock()
        result.seconds, result.spent = now - self.started, self.timesheet.close(now, self.backend.workers())
        return result

    def _result(self) -> RoundResult:
        round, there = self._ledger.round, sorted(self._reports)
        result = self._clocked(RoundResult(round, gathered([(m, self._reports[m][1]) for m in there])))
        result.tasks = sum(len(round.episodes(m)) for m in there)
        for worker, report in {id(r): (w, r) for w, r in self._reports.values()}.values():
            result.note(worker, report)
        if self.quorum < 1.0 and round.kind == "train":
            first = round.version * round.microbatches
            result.applied = [Applied(m, first + m, round.version) for m in there]
            result.left_out = sorted(set(range(round.microbatches)) - set(there))
        return result


def gathered(answers: Sequence[tuple[int, Report]]) -> dict[str, np.ndarray]:
    """The metrics of microbatches, each with the report it is in, one after another."""
    pieces: dict[str, list[np.ndarray]] = {}
    for m, report in answers:
        round = report.lease.round
        at = (m - report.lease.start) * round.tasks_per_microbatch
        for name, values in report.metrics.items():
            pieces.setdefault(name, []).append(values[at : at + len(round.episodes(m))])
    return {k: np.concatenate(v) for k, v in pieces.items()}


def not_finite(report: Report) -> NonFiniteError:
    """The error of an answer whose losses or gradients are not finite."""
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
