"""The controller over a scripted backend: whatever happens to the workers, the sum's bits stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metadist.config.schema import OuterConfig
from metadist.errors import ClusterError, NonFiniteError
from metadist.outer.gradient import Block, partial_sums, placed
from metadist.runtime.backend import Computed, Died, Event, Joined
from metadist.runtime.controller import Controller, RoundResult, means
from metadist.server import ParameterServer
from metadist.worker import Lease, Report, Round

TASKS, PER_MICROBATCH, TIMEOUT_S = 11, 2, 5.0
FAULTS = ("answer", "twice", "die", "die after sending", "join", "silence")


class Scripted:
    """Workers in this process that answer, repeat themselves, die, join and hesitate as a script says.

    Args:
        script: what each call of ``wait`` does, with a number that picks whom; then everyone answers.
        workers: ready at the start.
        bad: numbers of episodes whose loss is not finite.
        losses: of each time that gradients are waited for, which third of them is lost.
    """

    def __init__(
        self, script: Sequence[tuple[str, int]] = (), workers: int = 3, bad: Sequence[int] = (), heirs: bool = True,
        losses: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.script, self.bad, self.heirs = list(script), set(bad), heirs
        self.ready, self.starting, self.next_worker = list(range(workers)), [], workers
        self.pending: list[tuple[int, Lease]] = []
        self.leases: list[tuple[int, Lease]] = []
        self.answers: dict[int, dict[Block, np.ndarray]] = {}
        self.accepted: list[Any] = []
        self.losses = list(losses)
        self.now, self.waits = 0.0, 0
        options = OuterConfig(optimizer="sgd", lr=0.1, steps=10, meta_batch_size=TASKS).model_dump()
        self.server = ParameterServer(np.linspace(-1, 1, 5, dtype=np.float32), options)

    # ------------------------------------------------------------- what a controller calls

    def idle(self) -> list[int]:
        busy = {w for w, _ in self.pending}
        return [w for w in self.ready if w not in busy]

    def workers(self) -> list[int]:
        return list(self.ready)

    def lease(self, worker: int, lease: Lease) -> None:
        assert worker in self.idle(), f"worker {worker} cannot take a lease"
        assert lease.number not in {n.number for _, n in self.leases}, "lease numbers are never used twice"
        self.pending.append((worker, lease))
        self.leases.append((worker, lease))

    def wait(self, timeout: float) -> list[Event]:
        self.waits += 1
        assert self.waits < 2000, "the round does not end"
        action, pick = self.script.pop(0) if self.script else ("answer", self.waits)
        if self.starting and action != "silence":
            self.ready.append(self.starting.pop(0))
            return [Joined(self.ready[-1])]
        if action == "join":
            return self._join()
        if action == "silence" or not self.pending:
            self.now += 2.0
            return []
        worker, lease = self.pending[pick % len(self.pending)]
        if action.startswith("die"):
            return self._die(worker, lease if action == "die after sending" else None)
        return self._answer(worker, lease) * (2 if action == "twice" else 1)

    def dismiss(self, worker: int, reason: str) -> Died:
        assert worker in {w for w, _ in self.pending}, f"worker {worker} owes nothing"
        self._die(worker, None)
        return Died(worker, reason)

    def accept(self, lease: Lease, version: int, count: int, slot: int | None = None, weight: float = 1.0) -> None:
        self.accepted.append((lease, version, count, placed(self.answers.pop(lease.number), slot, weight)))

    def drop(self, lease: Lease) -> None:
        self.answers.pop(lease.number, None)

    def settle(self) -> list[Lease]:
        pick, lost = (self.losses.pop(0) if self.losses else None), []
        for i, (lease, *message) in enumerate(self.accepted):
            if pick is not None and i % 3 == pick % 3:
                lost.append(lease)
            else:
                self.server.add(*message)
        self.accepted = []
        return lost

    def commit(self, version: int, tasks: float, slots: Sequence[int] | None = None) -> dict[str, float]:
        return self.server.commit(version, tasks, slots=slots)[1]

    # ------------------------------------------------------------- what happens

    def _answer(self, worker: int, lease: Lease) -> list[Event]:
        self.pending.remove((worker, lease))
        self._send(lease)
        return [Computed(worker, self.report(lease))]

    def _die(self, worker: int, sent: Lease | None) -> list[Event]:
        last = [] if sent is None else self._answer(worker, sent)
        self.pending = [(w, lease) for w, lease in self.pending if w != worker]
        self.ready.remove(worker)
        if self.heirs:
            self.starting.append(self.next_worker)
            self.next_worker += 1
        return [*last, Died(worker, "killed")]

    def _join(self) -> list[Event]:
        self.ready.append(self.next_worker)
        self.next_worker += 1
        return [Joined(self.ready[-1])]

    def _send(self, lease: Lease) -> None:
        if lease.round.kind == "train":
            values = [gradient(lease.round, m) for m in range(lease.start, lease.stop)]
            self.answers[lease.number] = partial_sums(lease.start, values, lease.round.microbatches)

    def report(self, lease: Lease) -> Report:
        episodes = [e for m in range(lease.start, lease.stop) for e in lease.round.episodes(m)]
        metrics = {"loss": np.array([np.sin(e * 1.7) for e in episodes]), "number": np.array(episodes, dtype=float)}
        return Report(lease, metrics, 1.0, 0.25, [e for e in episodes if e in self.bad])


def gradient(round: Round, microbatch: int) -> np.ndarray:
    rng = np.random.default_rng(round.episodes(microbatch).start)
    return (rng.normal(size=5) * 10.0 ** rng.integers(-5, 5, 5)).astype(np.float32)


def training_round(version: int) -> Round:
    return Round("train", version, "train", "train", version * TASKS, TASKS, PER_MICROBATCH)


def controller(backend: Any, **options: Any) -> Controller:
    return Controller(backend, TIMEOUT_S, clock=lambda: backend.now, **options)


def train(backend: Scripted, steps: int = 3) -> tuple[bytes, list[RoundResult], Controller]:
    driver, results = controller(backend), []
    for version in range(steps):
        results.append(driver.run(training_round(version)))
        backend.commit(version, TASKS)
    return backend.server.weights().tobytes(), results, driver


LOSSES = st.lists(st.integers(0, 2), max_size=4)
HISTORY = st.lists(st.tuples(st.sampled_from(FAULTS), st.integers(0, 20)), max_size=60)


@settings(deadline=None, max_examples=150)
@given(HISTORY, st.integers(1, 8), LOSSES)
@example([("silence", 0)] * 4 + [("die after sending", 0), ("twice", 1), ("join", 0)], 2, [1])
@example([("die", 0)] * 5, 1, [])
def test_no_history_changes_the_weights_or_the_metrics(
    script: list[tuple[str, int]], workers: int, losses: list[int]
) -> None:
    wanted, plain, _ = train(Scripted(workers=1))
    backend = Scripted(script, workers, losses=losses)
    weights, results, _ = train(backend)
    assert weights == wanted
    for version, (got, reference) in enumerate(zip(results, plain, strict=True)):
        assert got.metrics["number"].tolist() == list(range(version * TASKS, (version + 1) * TASKS))
        assert got.metrics["loss"].tobytes() == reference.metrics["loss"].tobytes()


def test_the_property_would_see_another_order_of_the_sum() -> None:
    wanted, other = train(Scripted())[0], Scripted()
    first, *rest = [gradient(training_round(0), m) for m in range(6)]
    other.server.add(0, 6, {Block(3, 0): sum(rest, first)})  # covers what comes later
    assert train(other)[0] != wanted


def test_work_is_shared_and_the_seconds_are_told() -> None:
    backend = Scripted(workers=3)
    _, results, driver = train(backend, steps=1)
    assert [(w, lease.start, lease.stop) for w, lease in backend.leases] == [(0, 0, 2), (1, 2, 4), (2, 4, 6)]
    assert results[0].worker_s == {0: 1.0, 1: 1.0, 2: 1.0}
    assert results[0].data_wait_s == 0.25 and driver.releases == 0


def test_a_death_in_the_middle_is_told_and_its_work_leased_again() -> None:
    told: list[str] = []
    backend = Scripted([("answer", 0), ("die", 0)], workers=2)
    driver = controller(backend, on_event=told.append)
    result = driver.run(training_round(0))
    assert told == ["worker 1 died (killed); 3 microbatches go to others", "worker 2 joined"]
    assert [(w, lease.start, lease.stop) for w, lease in backend.leases] == [(0, 0, 3), (1, 3, 6), (0, 3, 6)]
    assert set(result.worker_s) == {0} and driver.releases == 1


def test_gradients_that_are_lost_with_their_node_are_told_and_computed_again() -> None:
    told: list[str] = []
    backend = Scripted(workers=3, losses=[0])
    result = controller(backend, on_event=told.append).run(training_round(0))
    assert told == ["the gradients of 1 leases were lost with a node; they are computed again"]
    assert len(backend.leases) > 3 and result.metrics["number"].tolist() == list(range(TASKS))


def test_a_joiner_takes_leases_in_the_same_round() -> None:
    backend = Scripted([("die", 0), ("silence", 0)], workers=1)
    result = controller(backend).run(training_round(0))
    assert set(result.worker_s) == {1}


def test_a_silent_workers_lease_goes_to_another_and_its_late_answer_harms_nothing() -> None:
    wanted, plain, _ = train(Scripted(workers=1), steps=2)
    backend = Scripted([("answer", 1), ("silence", 0), ("silence", 0), ("silence", 0), ("answer", 1)], workers=2)
    driver = controller(backend)
    first = driver.run(training_round(0))
    assert driver.releases == 1 and set(first.worker_s) == {1}
    ((late, lease),) = backend.pending
    assert late == 0 and lease.round.version == 0, "worker 0 is still at the first round"
    backend.commit(0, TASKS)
    backend.script = [("answer", 0)]  # its answer of round 0 comes first in round 1
    second = driver.run(training_round(1))
    backend.commit(1, TASKS)
    assert backend.server.weights().tobytes() == wanted
    assert second.metrics["loss"].tobytes() == plain[1].metrics["loss"].tobytes()


def test_a_worker_that_hangs_over_rounds_is_dismissed_and_replaced() -> None:
    told: list[str] = []
    steps = 12
    wanted = train(Scripted(workers=1), steps)[0]
    # Worker 0 never answers; worker 1 does everything, its late second lease of the first round as well.
    backend = Scripted([("silence", 0)] * 3 + [("answer", 1)] * 2, workers=2)
    driver = controller(backend, on_event=told.append)
    for version in range(steps):
        backend.script = backend.script or [("silence", 0)] * 2 + [("answer", 1)] if not told else []
        driver.run(training_round(version))
        backend.commit(version, TASKS)
    assert told == ["worker 0 died (silent for 32 s); 0 microbatches go to others", "worker 2 joined"]
    assert backend.server.weights().tobytes() == wanted


@pytest.mark.parametrize("end", ["die", "answer"])
def test_a_worker_heard_of_at_the_end_of_patience_is_not_dismissed(end: str) -> None:
    class Late(Scripted):
        def wait(self, timeout: float) -> list[Event]:
            self.now += 40.0  # more than six times the timeout, within one wait
            return super().wait(timeout)

        def dismiss(self, worker: int, reason: str) -> Died:
            raise AssertionError(f"worker {worker} was heard of")

    backend = Late([(end, 0)], workers=1)
    assert controller(backend).run(training_round(0)).metrics["loss"].shape == (TASKS,)


class Timed(Scripted):
    """Workers that take their time: ``seconds[w]`` a microbatch; whoever is done first answers first."""

    def __init__(self, seconds: Sequence[float]) -> None:
        super().__init__(workers=len(seconds))
        self.seconds = seconds
        self.ends: dict[int, float] = {}

    def lease(self, worker: int, lease: Lease) -> None:
        super().lease(worker, lease)
        self.ends[lease.number] = self.now + self.seconds[worker] * (lease.stop - lease.start)

    def wait(self, timeout: float) -> list[Event]:
        worker, lease = min(self.pending, key=lambda p: self.ends[p[1].number])
        if self.ends[lease.number] > self.now + timeout:
            self.now += timeout
            return []
        self.now = max(self.now, self.ends[lease.number])
        return self._answer(worker, lease)


def timed(seconds: Sequence[float], rounds: int, **options: Any) -> list[float]:
    backend = Timed(seconds)
    driver, taken = Controller(backend, 600.0, clock=lambda: backend.now), []
    for version in range(rounds):
        taken.append(driver.run(training_round(version)).seconds)
        backend.commit(version, TASKS)
    taken.append(driver.releases)
    return taken


def test_work_is_dealt_by_the_speed_that_was_measured() -> None:
    # Six microbatches; the second worker is five times faster: five to one, once both are known.
    *taken, _ = timed([1.0, 0.2], 5)
    assert taken[0] == pytest.approx(3.0, abs=0.1), "nothing is known yet: three each"
    assert max(taken[2:]) <= 1.2 + 1e-9


def test_of_a_slow_worker_the_others_take_over() -> None:
    *taken, releases = timed([0.1] * 5 + [0.5], 40)
    plain = 0.5
    assert releases >= 1
    assert np.mean(taken[2:]) <= 0.55 * plain
    # It is tried again now and then; then somebody takes over after twice the usual time.
    assert max(taken[2:]) <= 0.33


def test_workers_of_one_speed_never_do_anything_twice() -> None:
    *taken, releases = timed([0.1, 0.11, 0.09], 30)
    assert releases == 0 and max(taken[2:]) <= 0.25


@given(HISTORY, st.integers(1, 8), st.sampled_from([0.2, 0.5, 0.99]), LOSSES)
def test_with_a_quorum_an_update_is_made_of_what_has_come_and_says_so(
    script: list[tuple[str, int]], workers: int, quorum: float, losses: list[int]
) -> None:
    backend = Scripted(script, workers, losses=losses)
    driver = controller(backend, quorum=quorum)
    wanted = Scripted().server
    for version in range(3):
        round = training_round(version)
        result = driver.run(round)
        backend.commit(version, result.tasks, result.slots)
        there = [a.slot for a in result.applied]
        assert len(there) >= quorum * round.microbatches
        assert sorted(there + result.left_out) == list(range(round.microbatches))
        assert [a.microbatch for a in result.applied] == [version * round.microbatches + m for m in there]
        assert result.metrics["number"].tolist() == [e for m in there for e in round.episodes(m)]
        assert result.tasks == len(result.metrics["number"])
        for m in there:
            wanted.add(version, round.microbatches, {Block(0, m): gradient(round, m)})
        wanted.commit(version, result.tasks, slots=there)
    assert backend.server.weights().tobytes() == wanted.weights().tobytes()


def test_a_quorum_does_not_wait_for_the_silent() -> None:
    backend = Scripted([("answer", 1), ("answer", 1)], workers=3)
    driver = controller(backend, quorum=0.6)
    result = driver.run(training_round(0))
    assert result.left_out == [0, 1] and backend.now == 0.0
    # An evaluation needs all of it; the silent one is at the old round and the others do it.
    judged = driver.run(Round("evaluate", 1, "test", "evaluation/test", 0, 7, 3))
    assert judged.metrics["number"].tolist() == list(range(7)) and not judged.left_out


def test_an_evaluation_gathers_its_metrics_in_episode_order_and_leaves_the_server_alone() -> None:
    backend = Scripted([("answer", 2), ("die", 1), ("answer", 0)], workers=3)
    before = backend.server.weights().tobytes()
    round = Round("evaluate", 0, "test", "evaluation/test", 0, 7, 3)
    result = controller(backend).run(round)
    assert result.metrics["number"].tolist() == list(range(7))
    assert backend.server.weights().tobytes() == before
    assert means(result.metrics) == {"loss": pytest.approx(np.sin(np.arange(7) * 1.7).mean()), "number": 3.0}


def test_when_nobody_is_left_and_nobody_comes_the_round_gives_up() -> None:
    told: list[str] = []
    backend = Scripted([("die", 0)], workers=1, heirs=False)
    with pytest.raises(ClusterError, match=r"no worker became ready in 30\d s"):
        controller(backend, on_event=told.append).run(training_round(0))
    assert told.count("no worker is left; waiting for a new one") == 1


# --------------------------------------------------------------------------- not finite


def test_a_loss_that_is_not_finite_stops_the_round_and_names_its_episodes() -> None:
    backend = Scripted(bad=[TASKS + 3, TASKS + 2])
    driver = controller(backend)
    driver.run(training_round(0))
    backend.commit(0, TASKS)
    before = backend.server.weights().tobytes()
    wanted = "^step 2: .*training episodes 13, 14 of split train is not finite; no update"
    with pytest.raises(NonFiniteError, match=wanted):
        driver.run(training_round(1))
    assert backend.server.version == 1 and backend.server.weights().tobytes() == before


def test_a_bad_evaluation_is_called_one_and_many_episodes_are_cut_short() -> None:
    round = Round("evaluate", 4, "test", "evaluation/test", 0, 12, 12)
    wanted = "evaluation episodes 0, 1, 2, 3, 4, 5, 6, 7 ... of split test"
    with pytest.raises(NonFiniteError, match=wanted):
        controller(Scripted(bad=range(12))).run(round)


def test_a_late_bad_answer_of_an_earlier_round_is_of_no_account() -> None:
    backend = Scripted([("answer", 1), ("silence", 0), ("silence", 0), ("silence", 0), ("answer", 1)], workers=2)
    driver = controller(backend)
    driver.run(training_round(0))
    backend.commit(0, TASKS)
    backend.bad = {0, 1}  # what the slow worker would say now of round 0
    backend.script = [("answer", 0)]
    assert driver.run(training_round(1)).metrics["loss"].shape == (TASKS,)
