"""Updates that wait for nobody: whoever answers is asked again at once, with the newest weights."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import Any

from metadist.rounds import Lease, Report, Round, lease_of, microbatch_of
from metadist.runtime.backend import Backend
from metadist.runtime.controller import POLL_S, Controller, RoundResult, gathered, not_finite
from metadist.runtime.leases import Ledger
from metadist.staleness import Applied, Flow


class AsynchronousController(Controller):
    """Gathers updates of a :class:`~metadist.staleness.Flow` over a backend; evaluations wait for all, as ever.

    Answers are judged in the order in which they are heard of, and staleness at the moment an answer is applied: the
    version cannot change between that and the update. What comes while an update is being made, or during an
    evaluation, is judged afterwards.

    Args:
        backend, options: as of :class:`Controller`.
        flow: which microbatches are computed, and which answers count.
    """

    def __init__(self, backend: Backend, flow: Flow, **options: Any) -> None:
        super().__init__(backend, **options)
        self.flow = flow
        self._gathering = False
        self._came: deque[tuple[int, Report]] = deque()
        self._taken: list[tuple[Applied, int, Report]] = []

    def begin(self, round: Round) -> None:
        """Goes on with the update of ``round.version``, or begins an evaluation."""
        self._gathering = round.kind == "train"
        if not self._gathering:
            super().begin(round)
            return
        self.begun = round
        # A ledger of nothing: what is waited for is the flow's business.
        self._ledger = Ledger(replace(round, tasks=0), self._next_lease)
        self._update, self.started = round, self.clock()
        self.timesheet.begin(self.started)
        self._take()
        self._lend()

    def finish(self) -> RoundResult:
        """Waits until the update, or the evaluation, has what it needs."""
        if not self._gathering:
            return super().finish()
        self._alone_since = None
        while not self.flow.full or self._reopened():
            self._turn()
        return self._gathered()

    def committed(self) -> None:
        """The update that was gathered is made."""
        self.flow.committed()
        self._taken = []

    def _lend(self) -> None:
        if not self._gathering:
            super()._lend()
            return
        if self.flow.full:
            return  # an update later the weights are newer
        now = self.clock()
        for worker in self.backend.idle():
            microbatch = self.flow.take()
            if microbatch is None:
                return
            self._ask(worker, lease_of(self._next_lease, self._update, microbatch), now)
            self._next_lease += 1

    def _until_late(self) -> float:
        return POLL_S if self._gathering else super()._until_late()

    def _lost(self, worker: int) -> int:
        lease, _ = self._asked.get(worker, (None, 0.0))
        if lease is None or lease.round.kind != "train" or lease.number < self._first_lease:
            return super()._lost(worker)
        self.flow.give_back([microbatch_of(lease)])
        return 1

    def _reopen(self, lease: Lease) -> None:
        self.flow.reopen(microbatch_of(lease))
        self._taken = [t for t in self._taken if t[2].lease.number != lease.number]

    def _answered(self, worker: int, report: Report) -> None:
        if report.lease.round.kind != "train":
            super()._answered(worker, report)
            return
        self._came.append((worker, report))
        if self._gathering:
            self._take()

    def _take(self) -> None:
        """Judges what has come, as long as the update has room."""
        while self._came and not self.flow.full:
            worker, report = self._came.popleft()
            lease, version = report.lease, self._update.version
            found = self.flow.answer(microbatch_of(lease), lease.round.version, version)
            if found is None:
                self.backend.drop(lease)
                continue
            if report.bad_tasks:
                raise not_finite(report)
            self._accept(lease, version, self.flow.per_update, found.slot, found.weight)
            self._taken.append((found, worker, report))

    def _gathered(self) -> RoundResult:
        self._taken.sort(key=lambda taken: taken[0].slot)
        metrics = gathered([(report.lease.start, report) for _, _, report in self._taken])
        result = self._clocked(RoundResult(self._update, metrics))
        for _, worker, report in self._taken:
            result.note(worker, report)
        result.applied, result.dropped = [a for a, _, _ in self._taken], list(self.flow.dropped)
        weighted = (a.weight * len(r.lease.round.episodes(r.lease.start)) for a, _, r in self._taken)
        result.tasks = math.fsum(weighted)
        return result
