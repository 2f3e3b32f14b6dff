"""Gradients and weights that lie in memory of the node: who reads what, what is lost with whom, and the bits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from metadist.outer.gradient import Block
from metadist.rounds import Lease, Report, Round
from metadist.runtime.ray import RayBackend
from metadist.runtime.ray_answers import Handle
from metadist.runtime.shared import Shared, can_share
from tests.ray.several_nodes import MICROBATCHES
from tests.ray.test_small_gradients import Counted, OneEach, answers, plainly

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.skipif(not can_share(), reason="this system has no memory that is shared without a file"),
]


class TellsWeights(OneEach):
    """Tells in its report with which weights it computed."""

    def compute(
        self, lease: Lease, weights: Sequence[np.ndarray], room: Any = None
    ) -> tuple[Report, dict[Block, np.ndarray]]:
        report, blocks = super().compute(lease, weights)
        return Report(lease, {"loss": report.metrics["loss"], "weight": np.array([float(weights[0][0])])}, 0, 0), blocks


@pytest.fixture
def backend(started: Callable[..., RayBackend], monkeypatch: pytest.MonkeyPatch) -> Callable[..., RayBackend]:
    monkeypatch.setattr("metadist.runtime.ray.RayServer", Counted)
    monkeypatch.setattr(Counted, "sizes", [], raising=False)

    def make(worker: Any = OneEach, **runtime: Any) -> RayBackend:
        run = started(worker, **runtime)
        while len(run.workers()) < 2:
            run.wait(1.0)
        for handle in run._handles.values():
            assert handle.reached is None
        return run

    return make


def parts_of(run: RayBackend, lease: Lease) -> list[Any]:
    return run._answered[lease.number][1]


def end(run: RayBackend, handle: Handle) -> None:
    """Kills a worker; asked for something, it is found to be gone."""
    os.kill(handle.pid, signal.SIGKILL)
    (number,) = (n for n, h in run._handles.items() if h is handle)
    run.lease(number, Lease(10_000 + number, Round("evaluate", 0, "test", "test", 0, 1, 1), 0, 1))
    while handle in run._handles.values():
        run.wait(1.0)


def update(run: RayBackend, version: int, first: int) -> None:
    for lease in answers(run, version, range(MICROBATCHES), first):
        run.accept(lease, version, MICROBATCHES)
    assert run.settle() == []
    run.commit(version, MICROBATCHES)


@pytest.mark.parametrize("shards", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_nothing_is_sent_but_where_it_lies(backend: Callable[..., RayBackend], shards: int) -> None:
    run = backend(server_shards=shards)
    for version in range(3):
        leases = answers(run, version, range(MICROBATCHES), MICROBATCHES * version)
        assert all(isinstance(part, Shared) for lease in leases for part in parts_of(run, lease))
        for lease in leases:
            run.accept(lease, version, MICROBATCHES)
        # The server has to open an area once; what lies in one that is open is told with the update.
        opened = len(Counted.sizes)
        assert run.settle() == [] and not run.server.holds_back and not run.server._sure
        run.commit(version, MICROBATCHES)
        assert len(Counted.sizes) == opened
        assert all(isinstance(part, Shared) for part in run.server.weights([True] * shards))
    assert 0 < len(Counted.sizes) <= MICROBATCHES
    assert run.snapshot()["weights"].tobytes() == plainly(3)


@pytest.mark.slow
def test_memory_is_used_again(backend: Callable[..., RayBackend]) -> None:
    run = backend()
    areas = set()
    for version in range(4):
        for lease in answers(run, version, range(MICROBATCHES), MICROBATCHES * version):
            # An answer that is dropped gives back what it lies in at once.
            (again,) = answers(run, version, [0], 1000 + lease.number)
            areas |= {part.area for given in (lease, again) for part in parts_of(run, given)}
            run.drop(again)
            run.accept(lease, version, MICROBATCHES)
        assert run.settle() == []
        run.commit(version, MICROBATCHES)
    assert len(areas) <= MICROBATCHES + 2, "one for each gradient that waits, and one of each worker to be dropped"
    assert [len(pages) for pages in run.server._pages] == [1], "nobody read older weights"
    assert run.snapshot()["weights"].tobytes() == plainly(4)


def test_what_a_dead_worker_left_is_computed_again_if_nobody_has_opened_it(backend: Callable[..., RayBackend]) -> None:
    run = backend()
    leases = answers(run, 0, range(MICROBATCHES))
    (first,) = {handle for handle, parts in run._answered.values() if parts[0].area == parts_of(run, leases[0])[0].area}
    theirs = [lease for lease in leases if run._answered[lease.number][0] is first]
    end(run, first)
    for lease in leases:
        run.accept(lease, 0, MICROBATCHES)
    lost = run.settle()
    assert lost == theirs, "the fault was not seen to fire"
    for lease in answers(run, 0, [lease.start for lease in lost], 100):
        run.accept(lease, 0, MICROBATCHES)
    assert run.settle() == []
    run.commit(0, MICROBATCHES)
    assert run.snapshot()["weights"].tobytes() == plainly(1)


@pytest.mark.slow
def test_what_a_dead_worker_left_stays_if_the_server_has_it_open(backend: Callable[..., RayBackend]) -> None:
    run = backend()
    update(run, 0, 0)
    leases = answers(run, 1, range(MICROBATCHES), 100)
    for lease in leases:
        run.accept(lease, 1, MICROBATCHES)
    for handle in list(run._handles.values()):
        end(run, handle)
    assert run.settle() == []
    run.commit(1, MICROBATCHES)
    update(run, 2, 200)
    assert run.snapshot()["weights"].tobytes() == plainly(3)


def test_weights_stay_where_they_are_while_somebody_is_to_read_them(backend: Callable[..., RayBackend]) -> None:
    run = backend(TellsWeights)
    update(run, 0, 0)
    expected = float(run.snapshot()["weights"][0])
    slow, quick = (run._handles[n] for n in run.idle())
    os.kill(slow.pid, signal.SIGSTOP)
    late = Lease(50, Round("train", 1, "train", "train", MICROBATCHES, MICROBATCHES, 1), 0, 1)
    run.lease(run.idle()[0], late)
    for version in (1, 2, 3):
        update(run, version, 100 * version)
    assert [len(pages) for pages in run.server._pages] == [2]
    os.kill(slow.pid, signal.SIGCONT)
    found: list[Any] = []
    while not found:
        found = [event for event in run.wait(1.0) if getattr(event, "report", None)]
    assert found[0].report.lease == late and found[0].report.metrics["weight"] == [expected]
    assert run.snapshot()["weights"].tobytes() == plainly(4) and quick in run._handles.values()


@pytest.mark.slow
def test_a_worker_that_is_late_to_say_that_it_shares_memory_shares_it_then(backend: Callable[..., RayBackend]) -> None:
    run = backend()
    late = run._handles[run.idle()[0]]
    os.kill(late.pid, signal.SIGSTOP)
    lease = Lease(50, Round("train", 0, "train", "train", 0, MICROBATCHES, 1), 0, 1)
    run.lease(run.idle()[0], lease)
    assert late.near == [False] and late.reaching is not None
    for version in range(2):
        update(run, version, 100 * (version + 1))
    os.kill(late.pid, signal.SIGCONT)
    patience = time.monotonic() + 20
    while late.answers and time.monotonic() < patience:
        run.wait(1.0)
    assert not isinstance(parts_of(run, lease)[0], Shared)
    run.drop(lease)
    assert run._near(late) == [True]
    update(run, 2, 300)
    assert run.snapshot()["weights"].tobytes() == plainly(3)
