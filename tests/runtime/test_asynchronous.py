"""The asynchronous controller over a scripted backend: nothing is lost or too old, and all of it is written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metadist.errors import NonFiniteError
from metadist.outer.gradient import partial_sums
from metadist.rounds import Lease, Round, lease_of, microbatch_of
from metadist.runtime.asynchronous import AsynchronousController
from metadist.runtime.backend import Computed, Event
from metadist.runtime.controller import RoundResult
from metadist.staleness import Applied, Flow
from tests.runtime.test_controller import HISTORY, LOSSES, TASKS, TIMEOUT_S, Scripted, training_round

PER_ROUND = training_round(0).microbatches


def gradient(weights: np.ndarray, lease: Lease) -> np.ndarray:
    """Of a microbatch at some weights."""
    rng = np.random.default_rng(lease.round.episodes(lease.start).start)
    return (rng.normal(size=5) * 10.0 ** rng.integers(-5, 5, 5) + np.float32(0.3) * weights).astype(np.float32)


class Moving(Scripted):
    """Workers whose gradients depend on the weights they were given with the lease."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.given: dict[int, np.ndarray] = {}

    def lease(self, worker: int, lease: Lease) -> None:
        assert lease.round.kind == "evaluate" or lease.round.version == self.server.version
        super().lease(worker, lease)
        self.given[lease.number] = self.server.weights()

    def _send(self, lease: Lease) -> None:
        if lease.round.kind == "train":
            value = gradient(self.given[lease.number], lease)
            self.answers[lease.number] = partial_sums(lease.start, [value], lease.round.microbatches)


def train(backend: Moving, flow: Flow, steps: int, first: int = 0, evaluate: bool = False) -> list[RoundResult]:
    driver = AsynchronousController(backend, flow, lease_timeout_s=TIMEOUT_S, clock=lambda: backend.now)
    results = []
    for version in range(first, steps):
        results.append(driver.run(training_round(version)))
        backend.commit(version, results[-1].tasks, results[-1].slots)
        driver.committed()
        if evaluate:
            judged = driver.run(Round("evaluate", version + 1, "test", "evaluation/test", 0, 7, 3))
            assert judged.metrics["number"].tolist() == list(range(7))
    assert not backend.answers, "gradients were kept that nobody will ask for"
    return results


def again(results: Sequence[RoundResult], per_update: int) -> bytes:
    """The weights, from what the results say alone."""
    server = Moving().server
    weights = [server.weights()]
    for version, result in enumerate(results):
        values = []
        for a in result.applied:
            lease = lease_of(0, training_round(a.base), a.microbatch)
            values.append(gradient(weights[a.base], lease) * np.float32(a.weight))
        server.add(version, per_update, partial_sums(0, values, per_update))
        server.commit(version, result.tasks)
        weights.append(server.weights())
    return weights[-1].tobytes()


@settings(max_examples=150)
@given(
    HISTORY, st.integers(1, 8), st.integers(1, 4), st.sampled_from([2, PER_ROUND, 9]),
    st.sampled_from(["constant", "inverse"]), st.booleans(), LOSSES,
)  # fmt: skip
@example([("silence", 0)] * 4 + [("die", 0), ("twice", 1), ("join", 0)], 2, 1, 2, "inverse", True, [1, 0])
def test_every_history_is_written_down_and_uses_each_microbatch_once(
    script: list[tuple[str, int]], workers: int, bound: int, per_update: int, weighting: Any, evaluate: bool,
    losses: list[int],
) -> None:  # fmt: skip
    steps = 4
    backend, flow = Moving(script, workers, losses=losses), Flow(4 * per_update, per_update, bound, weighting)
    results = train(backend, flow, steps, evaluate=evaluate)
    used = [a.microbatch for r in results for a in r.applied]
    assert sorted(used) == list(range(steps * per_update))
    for result in results:
        assert max(result.staleness) <= bound
        assert [a.weight for a in result.applied] == [
            1.0 if weighting == "constant" else 1 / (1 + s) for s in result.staleness
        ]
        episodes = [e for a in result.applied for e in episodes_of(a)]
        assert result.metrics["number"].tolist() == episodes
        weighted = sum(a.weight * len(list(episodes_of(a))) for a in result.applied)
        assert result.tasks == pytest.approx(weighted)
    assert backend.server.weights().tobytes() == again(results, per_update)


def episodes_of(applied: Applied) -> range:
    lease = lease_of(0, training_round(applied.base), applied.microbatch)
    assert microbatch_of(lease) == applied.microbatch
    return lease.round.episodes(lease.start)


def test_one_worker_is_never_stale_and_goes_the_way_of_a_synchronous_run() -> None:
    results = train(Moving(workers=1), Flow(5 * PER_ROUND, PER_ROUND, 4), 5)
    for version, result in enumerate(results):
        first = version * PER_ROUND
        assert result.applied == [Applied(m, first + m, version) for m in range(PER_ROUND)]
        assert result.tasks == TASKS and not result.dropped


def test_what_comes_too_late_is_dropped_told_and_computed_again() -> None:
    # Worker 0 answers after everybody else has made three updates.
    script = [("answer", 1)] * 6 + [("answer", 0)]
    backend = Moving(script, workers=2)
    results = train(backend, Flow(4 * 2, 2, 1), 4)
    assert [r.dropped for r in results] == [[], [], [], [(0, 0)]]
    assert sorted(a.microbatch for r in results for a in r.applied) == list(range(8))
    assert 0 in [a.microbatch for a in results[3].applied]


def test_the_server_goes_on_while_a_worker_is_silent() -> None:
    backend = Moving([("answer", 1)] * 8, workers=2)
    results = train(backend, Flow(4 * 2, 2, 4), 4)
    assert [0 in {a.microbatch for a in r.applied} for r in results] == [False, False, False, True]


def test_a_resumed_run_computes_what_was_open() -> None:
    flow = Flow(6 * 2, 2, 2)
    backend = Moving([("answer", 2), ("answer", 1), ("silence", 0)] * 3, workers=4)
    driver = AsynchronousController(backend, flow, lease_timeout_s=TIMEOUT_S, clock=lambda: backend.now)
    first = []
    for version in range(3):
        first.append(driver.run(training_round(version)))
        backend.commit(version, first[-1].tasks)
        driver.committed()
    driver.begin(training_round(3))  # some are leased, perhaps accepted, when the run ends
    state, snapshot = flow.state(), backend.server.snapshot()
    assert state["open"], "nothing was under way"
    other = Moving(workers=3)
    other.server.restore(snapshot)
    rest = train(other, Flow(6 * 2, 2, 2, state=state), 6, first=3)
    assert sorted(a.microbatch for r in first + rest for a in r.applied) == list(range(12))
    assert other.server.weights().tobytes() == again(first + rest, 2)


def test_a_bad_answer_ends_the_run_unless_it_was_too_old_to_count() -> None:
    backend = Moving([("answer", 1)] * 6 + [("answer", 0)], workers=2, bad=[0, 1])
    flow = Flow(4 * 2, 2, 1)
    driver = AsynchronousController(backend, flow, lease_timeout_s=TIMEOUT_S, clock=lambda: backend.now)
    with pytest.raises(NonFiniteError, match="episodes 0, 1 of split train"):
        for version in range(4):
            result = driver.run(training_round(version))
            backend.commit(version, result.tasks)
            driver.committed()
    assert flow.dropped == [(0, 0)] and backend.server.version == 3


class Twice(Moving):
    """Everybody's answer is told once more with the next one."""

    def wait(self, timeout: float) -> list[Event]:
        events = super().wait(timeout)
        return events + [e for e in events if isinstance(e, Computed)]


def test_an_answer_that_is_told_twice_counts_once() -> None:
    results = train(Twice(workers=3), Flow(4 * 2, 2, 3), 4)
    assert sorted(a.microbatch for r in results for a in r.applied) == list(range(8))
