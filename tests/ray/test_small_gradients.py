"""Gradients that go within messages: several in one, nobody waits for them, and the sum is what it would be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import ray

from metadist.errors import ServerLostError
from metadist.outer.gradient import Block
from metadist.rounds import Lease, Report, Round
from metadist.runtime import cluster as clusters
from metadist.runtime.ray import RayBackend
from metadist.runtime.ray_calls import kill
from metadist.runtime.ray_server import RayServer
from metadist.server import ParameterServer
from tests.ray.several_nodes import MICROBATCHES, NUMEL, Worker, gradient, settings

pytestmark = pytest.mark.usefixtures("cluster")


class Counted(RayServer):
    """Notes how many gradients went with each message to the server."""

    sizes: list[int]

    def _add(self, *what: Any) -> list[Any]:
        self.sizes.append(len(what[-1]))
        return super()._add(*what)


class OneEach(Worker):
    """Answers a lease of one microbatch at once."""

    def compute(
        self, lease: Lease, weights: Sequence[np.ndarray], room: Any = None
    ) -> tuple[Report, dict[Block, np.ndarray]]:
        value = gradient(lease.round.version, lease.start, np.concatenate(weights))
        return Report(lease, {"loss": np.zeros(1)}, 0.0, 0.0), {Block(0, lease.start): value}


@pytest.fixture
def backend(started: Callable[..., RayBackend], monkeypatch: pytest.MonkeyPatch) -> Callable[..., RayBackend]:
    monkeypatch.setattr("metadist.runtime.ray.RayServer", Counted)
    monkeypatch.setattr(Counted, "sizes", [], raising=False)
    return lambda **runtime: started(OneEach, transport="object_store", **runtime)


def answers(backend: RayBackend, version: int, microbatches: Sequence[int], first: int = 0) -> list[Lease]:
    """Has microbatches computed one by one; the leases, answered and not yet accepted."""
    round = Round("train", version, "train", "train", version * MICROBATCHES, MICROBATCHES, 1)
    leases = []
    for number, m in enumerate(microbatches, first):
        leases.append(Lease(number, round, m, m + 1))
        while not backend.idle():
            backend.wait(1.0)
        backend.lease(backend.idle()[0], leases[-1])
        while leases[-1].number not in backend._answered:
            backend.wait(1.0)
    return leases


def plainly(versions: int) -> bytes:
    _, outer, start = settings()
    server = ParameterServer(start["weights"], outer)
    for version in range(versions):
        weights = server.weights()
        for m in range(MICROBATCHES):
            server.add(version, MICROBATCHES, {Block(0, m): gradient(version, m, weights)})
        server.commit(version, MICROBATCHES)
    return server.weights().tobytes()


@pytest.mark.parametrize("shards", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_they_go_together_and_nobody_waits(backend: Callable[..., RayBackend], shards: int) -> None:
    run = backend(server_shards=shards)
    assert clusters.within_messages() > NUMEL * 4
    for version in range(2):
        for lease in answers(run, version, range(MICROBATCHES), MICROBATCHES * version):
            run.accept(lease, version, MICROBATCHES)
        assert Counted.sizes == [MICROBATCHES] * version and run.server.holds_back
        assert run.settle() == [] and not run.server.holds_back
        run.commit(version, MICROBATCHES)
    assert Counted.sizes == [MICROBATCHES] * 2
    assert run.snapshot()["weights"].tobytes() == plainly(2)


def test_they_wait_for_company_but_not_for_long(backend: Callable[..., RayBackend]) -> None:
    run = backend()
    (lease,) = answers(run, 0, [0])
    run.accept(lease, 0, MICROBATCHES)
    assert run.server.holds_back and not Counted.sizes
    slow = Lease(1, lease.round, 1, 2)
    run.lease(run.idle()[0], slow)
    run.wait(0.0)
    while run.server.holds_back:
        run.wait(1.0)
    assert Counted.sizes == [1]


@pytest.mark.slow
def test_a_server_that_dies_meanwhile_is_lost(backend: Callable[..., RayBackend]) -> None:
    run = backend()
    for lease in answers(run, 0, range(MICROBATCHES)):
        run.accept(lease, 0, MICROBATCHES)
    kill(run.server._shards._lines[0].by_ray())
    assert run.settle() == []
    with pytest.raises(ServerLostError):
        run.commit(0, MICROBATCHES)


@pytest.mark.slow
def test_a_gradient_that_is_too_large_is_waited_for(
    backend: Callable[..., RayBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metadist.runtime.ray.within_messages", lambda: NUMEL * 4 - 1)
    run = backend()
    for lease in answers(run, 0, range(MICROBATCHES)):
        run.accept(lease, 0, MICROBATCHES)
    assert Counted.sizes == [1] * MICROBATCHES and not run.server.holds_back and not run.server._sure
    assert run.settle() == []
    run.commit(0, MICROBATCHES)
    assert run.snapshot()["weights"].tobytes() == plainly(1)


def test_a_cluster_of_somebody_else_sends_little_within_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray.get_runtime_context().gcs_address in clusters._started
    monkeypatch.setattr(clusters, "_started", set())
    assert clusters.within_messages() < 100 * 1024
