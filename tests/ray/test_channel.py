"""Messages between the driver and an actor of its node: what comes, what ends, and runs that are led by them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import ray

from metadist.errors import ServerLostError
from metadist.outer.gradient import Block
from metadist.rounds import Lease, Report, Round
from metadist.runtime import channel
from metadist.runtime.backend import Died
from metadist.runtime.channel import Channel, Line
from metadist.runtime.ray import RayBackend
from metadist.runtime.shared import can_share
from tests.ray.several_nodes import MICROBATCHES
from tests.ray.test_small_gradients import OneEach, answers, plainly

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.skipif(not can_share(), reason="this system has no way to open what another process has open"),
]


@ray.remote(num_cpus=0)
class _Clerk:
    """Answers ``b"5"`` by five bytes, and other words by what they say."""

    def attend(self, place: channel.Place) -> bool:
        return channel.attend(place, self._answer)

    def pid(self) -> int:
        return os.getpid()

    def _answer(self, message: bytes) -> bytes:
        if message == b"fail":
            raise ValueError("as it was asked")
        if message == b"pipe":
            raise BrokenPipeError("not of the channel")
        if message == b"sleep":
            time.sleep(60)
        return b"x" * int(message)


@pytest.fixture
def clerk() -> Iterator[Any]:
    made = _Clerk.remote()  # type: ignore[attr-defined]
    ray.get(made.pid.remote())
    yield made
    ray.kill(made)


def answer_of(over: Channel) -> bytes:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if channel.ready([over], 1.0) and (answer := over.answer()) is not None:
            return answer
    raise AssertionError("no answer came")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("size", [0, 1, 5_000, 3_000_000])
def test_answers_come_whole_and_in_turn(clerk: Any, size: int) -> None:
    before = open_descriptors()
    over = Channel(clerk.attend.remote)
    for extra in range(3):
        over.ask(str(size + extra).encode())
        assert answer_of(over) == b"x" * (size + extra)
    assert over.answer() is None and not over.has_ended()
    over.hang_up()
    assert ray.get(over.call, timeout=20) is True
    assert open_descriptors() == before, "a descriptor was left open"


@pytest.mark.parametrize("word, error", [(b"fail", ValueError), (b"pipe", BrokenPipeError)])
def test_an_actors_own_error_is_how_its_call_ends(clerk: Any, word: bytes, error: type[Exception]) -> None:
    over = Channel(clerk.attend.remote)
    over.ask(word)
    with pytest.raises(EOFError):
        answer_of(over)
    with pytest.raises(error):
        ray.get(over.call, timeout=20)
    over.ask(b"1")  # into nothing, and no error: asking for the answer gives it
    with pytest.raises(EOFError):
        over.answer()
    over.hang_up()


def test_the_death_of_an_actor_is_seen_at_once(clerk: Any) -> None:
    pid = ray.get(clerk.pid.remote())
    over = Channel(clerk.attend.remote)
    over.ask(b"sleep")
    assert channel.ready([over], 0.1) == []
    os.kill(pid, signal.SIGKILL)
    assert channel.ready([over], 20) == [over]
    with pytest.raises(EOFError):
        over.answer()
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(over.call, timeout=20)
    over.hang_up()


def test_a_line_is_a_channel_or_calls_never_both(clerk: Any) -> None:
    line = Line(clerk)
    for _ in range(3):
        over = line.by_channel()
        assert over is not None and line.by_channel() is over
        over.ask(b"2")
        assert answer_of(over) == b"xx"
        line.called = False
        assert ray.get(line.by_ray().pid.remote(), timeout=20) and line.channel is None and line.called


def test_an_actor_that_cannot_open_its_end_is_called_by_ray(clerk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line, before = Line(clerk), open_descriptors()
    genuine = channel._Pipe.of
    # As if another process had this number where the actor is.
    monkeypatch.setattr(channel._Pipe, "of", lambda descriptor: genuine(descriptor)._replace(inode=7))
    assert line.by_channel() is None
    monkeypatch.undo()
    assert line.by_channel() is None and open_descriptors() == before
    assert ray.get(line.by_ray().pid.remote(), timeout=20)


def test_an_actor_that_does_not_open_its_end_in_time_is_called_by_ray_for_a_while(
    clerk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(channel, "_OPENED_WITHIN_S", 0.2)
    pid, before = ray.get(clerk.pid.remote()), open_descriptors()
    os.kill(pid, signal.SIGSTOP)
    line = Line(clerk)
    waits = [channel._AGAIN_S, 2 * channel._AGAIN_S]
    with monkeypatch.context() as patch:
        patch.setattr(Line, "_clock", staticmethod(lambda: now[0]))
        for wait in waits:
            assert line.by_channel() is None
            now[0] += 0.9 * wait
            with monkeypatch.context() as unasked:
                unasked.setattr(channel, "Channel", None)
                assert line.by_channel() is None, "asked again too soon"
            now[0] += 0.2 * wait
        os.kill(pid, signal.SIGCONT)
        assert ray.get(line.by_ray().pid.remote(), timeout=20) == pid
        assert open_descriptors() == before
        monkeypatch.setattr(channel, "_OPENED_WITHIN_S", 20.0)
        over = line.by_channel()
    assert over is not None
    over.ask(b"3")
    assert answer_of(over) == b"xxx"
    over.hang_up()


class Fails(OneEach):
    def compute(
        self, lease: Lease, weights: Sequence[np.ndarray], room: Any = None
    ) -> tuple[Report, dict[Block, np.ndarray]]:
        if lease.start == 1 and lease.round.version:
            raise ValueError("a mistake of the user's")
        if lease.start == 2 and lease.round.version:
            return Report(lease, {"loss": np.zeros(1)}, 0, 0), {Block(0, 2): np.full(weights[0].shape, np.inf, "f4")}
        return super().compute(lease, weights)


@pytest.fixture
def backend(started: Callable[..., RayBackend]) -> Callable[..., RayBackend]:
    return lambda worker=OneEach, **runtime: started(worker, **runtime)


def update(run: RayBackend, version: int) -> None:
    for lease in answers(run, version, range(MICROBATCHES), 100 * version):
        run.accept(lease, version, MICROBATCHES)
    assert run.settle() == []
    run.commit(version, MICROBATCHES)


def steady(run: RayBackend, versions: int = 3) -> None:
    """Makes updates until all goes over channels."""
    while len(run.workers()) < 2:
        run.wait(1.0)
    for version in range(versions):
        update(run, version)
    assert all(line.channel for line in run.server._shards._lines), "the server is not asked over its channel"
    assert any(handle.line.channel for handle in run._handles.values())


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_updates_over_channels_give_the_same_bits(backend: Callable[..., RayBackend], shards: int) -> None:
    run = backend(server_shards=shards)
    steady(run)
    assert run.snapshot()["weights"].tobytes() == plainly(3)
    assert not any(line.channel for line in run.server._shards._lines)
    for version in (3, 4, 5):  # by Ray, as it was just called, and then over channels again
        update(run, version)
    assert all(line.channel for line in run.server._shards._lines)
    assert run.snapshot()["weights"].tobytes() == plainly(6)


@pytest.mark.slow
def test_a_worker_that_dies_over_a_lease_is_replaced(backend: Callable[..., RayBackend]) -> None:
    run = backend()
    steady(run)
    worker = next(n for n, handle in run._handles.items() if handle.line.channel)
    handle = run._handles[worker]
    os.kill(handle.pid, signal.SIGSTOP)
    run.lease(worker, Lease(999, Round("train", 3, "train", "train", 27, MICROBATCHES, 1), 0, 1))
    assert handle.line.channel is not None and not run.wait(0.2)
    os.kill(handle.pid, signal.SIGKILL)
    events: list[Any] = []
    while not any(isinstance(event, Died) for event in events):
        events += run.wait(1.0)
    assert [event.worker for event in events if isinstance(event, Died)] == [worker]
    while len(run.workers()) < 2:  # the other computes nothing: those that start are waited for by Ray alone
        run.wait(1.0)
    update(run, 3)
    assert run.snapshot()["weights"].tobytes() == plainly(4)


@pytest.mark.slow
def test_one_who_starts_is_heard_of_while_another_computes(backend: Callable[..., RayBackend]) -> None:
    run = backend()
    steady(run)
    busy, other = run.workers()
    os.kill(run._handles[busy].pid, signal.SIGSTOP)
    run.lease(busy, Lease(999, Round("train", 3, "train", "train", 27, MICROBATCHES, 1), 0, 1))
    run.dismiss(other, "for the test")
    while len(run.workers()) < 2:
        run.wait(1.0)
    os.kill(run._handles[busy].pid, signal.SIGCONT)
    while not run._answered:
        run.wait(1.0)


@pytest.mark.slow
def test_a_workers_own_error_comes_as_itself(backend: Callable[..., RayBackend]) -> None:
    run = backend(Fails)
    update(run, 0)
    update_leases = answers(run, 1, [0], 400)
    assert run._handles[0].line.channel and len(update_leases) == 1
    with pytest.raises(ValueError, match="a mistake of the user's"):
        answers(run, 1, [1], 500)


@pytest.mark.slow
def test_the_servers_own_error_comes_as_itself_and_it_goes_on(backend: Callable[..., RayBackend]) -> None:
    run = backend(Fails)
    while len(run.workers()) < 2:
        run.wait(1.0)
    update(run, 0)
    run.server._shards._lines[0].called = False
    for lease in answers(run, 1, [2], 500):
        run.accept(lease, 1, 1, 0)
    assert run.settle() == []
    run.server._shards._lines[0].called = False
    with pytest.raises(FloatingPointError, match="inf"):
        run.commit(1, 1)
    assert run.snapshot()["version"] == 1


@pytest.mark.slow
def test_a_server_that_dies_over_an_update_is_lost(backend: Callable[..., RayBackend]) -> None:
    run = backend()
    steady(run)
    snapshot = run.snapshot()
    update(run, 3)
    for lease in answers(run, 4, range(MICROBATCHES), 500):
        run.accept(lease, 4, MICROBATCHES)
    (part,) = run.server.weights([True])
    assert run.server._shards._lines[0].by_channel() is not None
    os.kill(part.area.pid, signal.SIGSTOP)  # type: ignore[union-attr]
    threading.Timer(0.5, os.kill, [part.area.pid, signal.SIGKILL]).start()  # type: ignore[union-attr]
    with pytest.raises(ServerLostError, match="parameter server") as lost:
        run.commit(4, MICROBATCHES)
    run.restore(snapshot, lost.value)
    update(run, 3)
    assert run.snapshot()["weights"].tobytes() == plainly(4)


@pytest.mark.slow
def test_what_one_shard_did_not_say_is_not_taken_for_the_next_answer(backend: Callable[..., RayBackend]) -> None:
    run = backend(server_shards=3, server_timeout_s=2)
    steady(run)
    for lease in answers(run, 3, range(MICROBATCHES), 500):
        run.accept(lease, 3, MICROBATCHES)
    assert run.settle() == []
    parts = run.server.weights([True] * 3)
    os.kill(parts[0].area.pid, signal.SIGSTOP)  # type: ignore[union-attr]
    with pytest.raises(ServerLostError, match="has not answered for 2 s"):
        run.commit(3, MICROBATCHES)
    os.kill(parts[0].area.pid, signal.SIGCONT)  # type: ignore[union-attr]
    # Nothing had been made of it: the same is asked again, and all is well.
    assert run.snapshot()["version"] == 3
    run.commit(3, MICROBATCHES)
    assert run.snapshot()["weights"].tobytes() == plainly(4)


@pytest.mark.slow
def test_a_server_that_hangs_over_an_update_is_lost(backend: Callable[..., RayBackend]) -> None:
    run = backend(server_timeout_s=2)
    steady(run)
    for lease in answers(run, 3, range(MICROBATCHES), 500):
        run.accept(lease, 3, MICROBATCHES)
    (part,) = run.server.weights([True])
    os.kill(part.area.pid, signal.SIGSTOP)  # type: ignore[union-attr]
    assert run.server._shards._lines[0].channel is not None
    with pytest.raises(ServerLostError, match="has not answered for 2 s"):
        run.commit(3, MICROBATCHES)
    os.kill(part.area.pid, signal.SIGKILL)  # type: ignore[union-attr]
