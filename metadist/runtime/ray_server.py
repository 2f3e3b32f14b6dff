"""The parameter server as Ray actors: its shards, and sums that are made on the nodes where gradients are.

What is sent to it goes by reference, from where it was computed; the driver holds references alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metadist.config.schema import RuntimeConfig, WorkersRange
from metadist.errors import ServerLostError, first_line
from metadist.outer.gradient import Block, TreeSum, placed
from metadist.outer.partition import cut, joined_snapshot, part_of_options, part_of_snapshot
from metadist.outer.update import norm_of
from metadist.outer.wire import widened
from metadist.rounds import Lease, sums_of
from metadist.runtime import channel
from metadist.runtime.channel import Line
from metadist.runtime.messages import packed, unpacked
from metadist.runtime.shared import Area, Reader, Shared, Writer, can_share
from metadist.runtime.transport import Transport
from metadist.server import ParameterServer

_START_TIMEOUT_S = 60.0
_MOST_AT_ONCE = 16
"""Small gradients in one message."""
_LARGE, _MOST_THREADS = 1 << 24, 8
"""Bytes of weights from which a shard uses more threads than a worker, and how many: then memory is no faster."""
_MOST_WITHIN = 8_000_000
"""Bytes that all answers of one call may take within its message; Ray's own limit is 10 MB."""


_Given = tuple[int, int | None, float, Shared]
"""A gradient in memory of the node: microbatches of the update, its place in the sum and its weight, where it lies."""


class _Squares(NamedTuple):
    """What a shard of several is asked before an update.

    Args:
        given: gradients that have not been sent.
        version, tasks, slots: as of :meth:`metadist.server.ParameterServer.squares`.
    """

    given: list[_Given]
    version: int
    tasks: float
    slots: Sequence[int] | None


class _Commit(NamedTuple):
    """What a shard is asked to make an update of.

    Args:
        given: gradients that have not been sent.
        version, tasks, norm, slots: as of :meth:`metadist.server.ParameterServer.commit`.
        page: where processes of the shard's node are to find the weights, which may be where they are; None: in a new
            place. Nobody reads what is there.
        far: whether the weights are to be returned, for all others.
    """

    given: list[_Given]
    version: int
    tasks: float
    norm: float | None
    slots: Sequence[int] | None
    page: Shared | None
    far: bool


@ray.remote
class _Shard:
    def __init__(self, snapshot: dict[str, Any], options: dict[str, Any], threads: int, transport: Transport) -> None:
        # Views: what an actor returns is in the object store before its next call begins.
        self._server, self._transport = ParameterServer.at(snapshot, options, threads, views=True), transport
        self._reader, self._writer = Reader(), Writer()
        self._page: Shared | None = None

    def ready(self) -> tuple[str, Shared | None]:
        """The node it is on, and where the weights lie for processes of this node."""
        self._transport.check()
        self._move_into(None)
        return str(ray.get_runtime_context().get_node_id()), self._page

    def weights(self) -> np.ndarray:
        return self._server.weights()

    def version(self) -> int:
        return self._server.version

    def retract(self, slot: int) -> None:
        self._server.retract(slot)

    def add(self, version: int, count: int, slot: int | None, weight: float, *parts: Any) -> int:
        given = (placed(self._blocks(part), slot, weight) for part in parts)
        return sum(self._server.add(version, count, blocks) for blocks in given)

    def attend(self, place: channel.Place) -> bool:
        """Answers over a channel."""
        return channel.attend(place, self.answer)

    def answer(self, message: bytes) -> Any:
        """What a :class:`_Squares` or a :class:`_Commit` asks for.

        Returns:
            The sums of squares of the gradient's chunks; or the statistics and where the new weights lie for processes
            of this node, and beside these bytes the weights, if others want them.
        """
        order: _Squares | _Commit = unpacked(message)
        self._take(order.given, order.version)
        if isinstance(order, _Squares):
            return packed(self._server.squares(order.version, order.tasks, order.slots))
        self._move_into(order.page)
        weights, stats = self._server.commit(order.version, order.tasks, order.norm, order.slots)
        told = packed((stats, self._page))
        return (told, weights) if order.far else told

    def _take(self, given: list[_Given], version: int) -> None:
        for count, slot, weight, part in given:
            self.add(version, count, slot, weight, part)

    def snapshot(self) -> dict[str, Any]:
        return self._server.snapshot()

    def forget(self, pid: int) -> None:
        self._reader.forget([pid])

    def _move_into(self, page: Shared | None) -> None:
        """Sees to it that the weights lie in a page which may be written to, where processes of the node find them.

        Args:
            page: which; None: a new one.
        """
        if not (self._transport.shares_memory and can_share()):
            return
        if page is None:
            self._page = self._writer.write([{None: self._server.weights()}])[0]
        elif self._page is None or page.area != self._page.area:
            self._page = page
        else:
            return
        self._server.move_into(self._writer.memory(self._page)[None])

    def _blocks(self, part: Any) -> dict[Block, np.ndarray]:
        if isinstance(part, Shared):
            return {block: widened(value) for block, value in self._reader.read(part).items()}
        return _given_by(self._transport, part)


@ray.remote
class _NodeSum:
    """Sums what the workers of its node have computed, so that one sum leaves the node instead of one from each."""

    def __init__(self, transport: Transport) -> None:
        self._version, self._transport = -1, transport
        self._sums: list[TreeSum] = []

    def add(self, version: int, count: int, *parts: Any) -> None:
        """Takes a lease's gradients, one of ``parts`` for each shard of the server."""
        if version != self._version:
            self._version, self._sums = version, [TreeSum(count) for _ in parts]
        for tree, part in zip(self._sums, parts, strict=True):
            for block, value in _given_by(self._transport, part).items():
                tree.add(block, value)

    def give(self, version: int) -> Any:
        """What has come so far, summed as far as it goes: for each shard of the server. It is let go."""
        if version != self._version:
            raise ValueError(f"asked for the sums of version {version}, but version {self._version} is here")
        sums, self._sums, self._version = self._sums, [], -1
        given = tuple(self._transport.pack(tree.held()) for tree in sums)
        return given if len(given) > 1 else given[0]


def _given_by(transport: Transport, part: Any) -> dict[Block, np.ndarray]:
    return {block: widened(value) for block, value in transport.unpack(part).items()}


@dataclass
class _Sent:
    """Messages on their way, the leases whose gradients are in them, and the memory that these lie in."""

    refs: list[ObjectRef]
    leases: list[Lease]
    slot: int | None = None
    areas: Collection[Area] = ()


@dataclass
class _Batch:
    """Gradients for an update, some for each shard of the server, which go with the next message."""

    version: int
    count: int
    parts: list[Sequence[Part]] = field(default_factory=list)


@dataclass
class _Waiting:
    """Gradients for an update in memory that the shards have opened, for each shard; they go with what ends it."""

    version: int
    given: list[list[_Given]]


@dataclass
class _Gathering:
    """A node's sums, and the leases that are in them and have not left the node."""

    actor: ActorHandle
    leases: list[Lease] = field(default_factory=list)
    version: int = 0
    count: int = 0


class RayServer:
    """Shards of a parameter server on a cluster, as one.

    Args:
        snapshot, outer: as of :meth:`metadist.runtime.backend.Backend.start`.
        runtime: how many shards, and their threads.
        transport: how gradients come to it.
        within: bytes of a gradient which Ray sends within the messages that would name it. What is so small is sent
            with others, in one message, and cannot be lost on its way: nobody waits until it has come. Nor can what
            lies in memory that the server has opened: where it lies is told with the message that ends the update.

    ``cuts`` are the parts of the flat vector, one for each shard.
    """

    def __init__(
        self,
        snapshot: dict[str, Any],
        outer: dict[str, Any],
        runtime: RuntimeConfig,
        transport: Transport,
        within: int = 0,
    ) -> None:
        self._transport = transport
        self._placing: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, **transport.options}
        self.cuts = cut(outer["sizes"], runtime.server_shards)
        self._timeout_s = runtime.server_timeout_s
        self._sent: list[_Sent] = []
        self._sure: list[ObjectRef] = []
        self._batch = _Batch(-1, 0)
        largest = max(z - a for a, z in self.cuts) * snapshot["weights"].itemsize
        self._small = within // largest if transport.within_messages and largest * len(self.cuts) < _MOST_WITHIN else 0
        self._opened: set[Area] = set()
        self._waiting = _Waiting(-1, [[] for _ in self.cuts])
        self._asked_far = False
        self._node_sums: dict[str, _Gathering] = {}
        # Shards compute nothing to speak of but move much: each on another node, as far as there are nodes. Where nodes
        # come and go they stay on the driver's, without which the run would end anyway.
        self._here = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(self._here, soft=False)
        spread = len(self.cuts) > 1 and not isinstance(runtime.workers, WorkersRange)
        where = {**self._placing, "scheduling_strategy": "SPREAD" if spread else here}
        self._lines: list[Line] = []
        for a, z in self.cuts:
            part, options = part_of_snapshot(snapshot, a, z), part_of_options(outer, a, z)
            made = _Shard.options(**where).remote(  # type: ignore[attr-defined]
                part, options, _threads(runtime, part["weights"].nbytes), transport
            )
            self._lines.append(Line(made))
        self._ready: list[ObjectRef] = [shard.ready.remote() for shard in self._shards()]
        self._homes: list[str] = []
        self._shown: list[Shared | None] = [None] * len(self.cuts)
        # Where weights lie that were shown, and of which version.
        self._pages: list[list[tuple[Shared, int]]] = [[] for _ in self.cuts]
        self._first_version: int = snapshot["version"]
        self._stored: list[ObjectRef | None] = [None] * len(self.cuts)

    def wait(self) -> None:
        """Waits until it has started, which may take longer than any later answer.

        Raises:
            ServerLostError: it did not.
        """
        ready = self._got(self._ready, max(_START_TIMEOUT_S, self._timeout_s))
        self._homes, self._shown = [node for node, _ in ready], [shown for _, shown in ready]
        self._note_pages(self._first_version)

    def offers(self, node: str) -> list[Shared | None]:
        """Of each shard what a process of ``node`` may try to open, if it is on that node."""
        return [
            shown if home == node else None
            for home, shown in zip(self._homes or [""] * len(self.cuts), self._shown, strict=True)
        ]

    def weights(self, near: Sequence[bool]) -> list[Part]:
        """The present version's weights, of each shard where they lie or a reference to them.

        Args:
            near: whether who asks can open the shard's memory.
        """
        found: list[Part] = []
        for i, line in enumerate(self._lines):
            shown, stored = self._shown[i], self._stored[i]
            if near[i] and shown is not None:
                found.append(shown)
                continue
            self._asked_far = True
            self._stored[i] = stored = line.by_ray().weights.remote() if stored is None else stored
            found.append(stored)
        return found

    def forget(self, pid: int) -> None:
        """Closes what was opened of a process that has ended, once what waits has come."""
        self._send_waiting()
        self._opened = {area for area in self._opened if area.pid != pid}
        for shard in self._shards():
            shard.forget.remote(pid)

    def add(
        self,
        lease: Lease,
        version: int,
        count: int,
        parts: Sequence[Part],
        slot: int | None = None,
        weight: float = 1.0,
    ) -> None:
        """Sends each shard its part of what a lease gave; the rest as of ``Backend.accept``."""
        areas = areas_of(parts)
        here = [part for part in parts if isinstance(part, Shared)]
        if len(here) == len(parts) and areas <= self._opened:
            if self._waiting.version != version:
                self._waiting = _Waiting(version, [[] for _ in self.cuts])
            for of_shard, part in zip(self._waiting.given, here, strict=True):
                of_shard.append((count, slot, weight, part))
        elif here or sums_of(range(lease.start, lease.stop), lease.round.microbatches) > self._small:
            self._sent.append(_Sent(self._add(version, count, slot, weight, [parts]), [lease], slot, areas))
        elif slot is not None or weight != 1.0:
            self._sure += self._add(version, count, slot, weight, [parts])
        else:
            if (self._batch.version, self._batch.count) != (version, count) or len(self._batch.parts) >= _MOST_AT_ONCE:
                self.send_batch()
                self._batch = _Batch(version, count)
            self._batch.parts.append(parts)

    @property
    def holds_back(self) -> bool:
        """Whether small gradients wait for others to be sent with."""
        return bool(self._batch.parts)

    def send_batch(self) -> None:
        """Sends what waits for others."""
        batch, self._batch = self._batch, _Batch(-1, 0)
        if batch.parts:
            self._sure += self._add(batch.version, batch.count, None, 1.0, batch.parts)

    def _add(
        self, version: int, count: int, slot: int | None, weight: float, given: list[Sequence[Part]]
    ) -> list[ObjectRef]:
        columns = zip(self._shards(), zip(*given, strict=True), strict=True)
        return [shard.add.remote(version, count, slot, weight, *column) for shard, column in columns]

    def add_on_node(self, node: str, lease: Lease, version: int, count: int, parts: Sequence[Part]) -> None:
        """Sends a lease's gradients to the sums of the node they are on, which go on with :meth:`pass_on`."""
        if node not in self._node_sums:
            on_it = NodeAffinitySchedulingStrategy(node, soft=False)
            where = {**self._placing, "scheduling_strategy": on_it}
            made = _NodeSum.options(**where).remote(self._transport)  # type: ignore[attr-defined]
            self._node_sums[node] = _Gathering(made)
        gathering = self._node_sums[node]
        gathering.version, gathering.count = version, count
        gathering.leases.append(lease)
        self._sent.append(_Sent([gathering.actor.add.remote(version, count, *parts)], [lease]))

    def pass_on(self, node: str) -> None:
        """Sends the server what a node has summed."""
        gathering = self._node_sums[node]
        if not gathering.leases:
            return
        leases, gathering.leases = gathering.leases, []
        given: Any = gathering.actor.give.options(num_returns=len(self.cuts)).remote(gathering.version)
        parts = list(given) if len(self.cuts) > 1 else [given]
        # Whatever their size: they are on their way from a node that may be gone.
        self._sent.append(_Sent(self._add(gathering.version, gathering.count, None, 1.0, [parts]), leases))

    def settle(self) -> list[Lease]:
        """See :meth:`metadist.runtime.backend.Backend.settle`."""
        for node in self._node_sums:
            self.pass_on(node)
        self.send_batch()
        sent, self._sent = self._sent, []
        lost: dict[int, Lease] = {}
        all_came = not sent or self._all_came(sent)
        for message in sent:
            if all_came or not self._failed(message):
                self._opened.update(message.areas)
                continue
            lost |= {lease.number: lease for lease in message.leases}
            if message.slot is not None:
                # Some shards may have it, and another gradient will take its place.
                self._got([s.retract.remote(message.slot) for s in self._shards()])
        if lost:
            self._node_sums.clear()
        return [lost[number] for number in sorted(lost)]

    def commit(
        self,
        version: int,
        tasks: float,
        slots: Sequence[int] | None = None,
        read: Collection[int] = (),
    ) -> dict[str, float]:
        """See :meth:`metadist.runtime.backend.Backend.commit`.

        Args:
            version, tasks, slots: as there.
            read: versions whose weights somebody who was asked for something may still read.
        """
        sure, self._sure = self._sure, []
        norm, given = None, self._given(version)
        if len(self.cuts) > 1:
            orders = [packed(_Squares(g, version, tasks, slots)) for g in given]
            asked = [self._ask(line, order)[0] for line, order in zip(self._lines, orders, strict=True)]
            squares = map(unpacked, self._told(asked))
            norm, given = norm_of(itertools.chain(*squares)), [[] for _ in self.cuts]
        far = self._asked_far
        # The last of them, in which the weights lie, if nobody reads it.
        pages = [next((p for p, of in reversed(pages) if of not in read), None) for pages in self._pages]
        commits = [
            packed(_Commit(g, version, tasks, norm, slots, page, far))
            for g, page in zip(given, pages, strict=True)
        ]
        made = [self._ask(line, order, far) for line, order in zip(self._lines, commits, strict=True)]
        self._stored = [stored for _, stored in made]
        self._asked_far = False
        told = [unpacked(message) for message in self._told([asked for asked, _ in made], sure)]
        self._shown = [shown for _, shown in told]
        self._note_pages(version + 1)
        for line in self._lines:
            line.called = False
        stats: dict[str, float] = told[-1][0]
        return stats

    def _shards(self) -> list[ActorHandle]:
        """The actors, to be called by Ray."""
        return [line.by_ray() for line in self._lines]

    def _ask(self, line: Line, message: bytes, far: bool = False) -> tuple[ObjectRef | Line, ObjectRef | None]:
        """Asks a shard something; what to ask for its answer, and with ``far`` the reference to what it returns beside.

        It is asked over a channel, if it was not called since the last update: it would be again.
        """
        on_this_node = bool(self._homes) and self._homes[self._lines.index(line)] == self._here
        if on_this_node and not far and not line.called and len(message) <= channel.MOST:
            over = line.by_channel()
            if over is not None:
                over.ask(message)
                return line, None
        call: Any = line.by_ray().answer
        if not far:
            return call.remote(message), None
        told, beside = call.options(num_returns=2).remote(message)
        return told, beside

    def _told(self, asked: Sequence[ObjectRef | Line], sure: Sequence[ObjectRef] = ()) -> list[bytes]:
        """The answers to :meth:`_ask`; waits until what is ``sure`` to come has come as well."""
        refs = [ref for ref in asked if not isinstance(ref, Line)]
        try:
            by_ray = iter(self._got([*sure, *refs])[len(sure) :] if sure or refs else [])
            return [self._over(line) if isinstance(line, Line) else next(by_ray) for line in asked]
        except BaseException:
            # Of some the answer has not been heard: it must not be taken for that to another question.
            self._shards()
            raise

    def _over(self, line: Line) -> bytes:
        """The answer that comes over a line's channel."""
        over, until = line.channel, time.monotonic() + self._timeout_s
        assert over is not None, "it was asked over it"
        while True:
            try:
                answer = over.answer()
                ended = answer is None and not channel.ready([over], min(1.0, self._timeout_s)) and over.has_ended()
            except EOFError:
                answer, ended = None, True
            if answer is not None:
                return answer
            if ended:
                self._got([over.call])
                raise ServerLostError("parameter server", "has stopped answering")
            if time.monotonic() > until:
                raise self._silent(self._timeout_s)

    def _note_pages(self, version: int) -> None:
        for pages, shown in zip(self._pages, self._shown, strict=True):
            if shown is not None:
                pages[:] = [(page, of) for page, of in pages if page.area != shown.area] + [(shown, version)]

    def _given(self, version: int) -> list[list[_Given]]:
        """What waits for the update of ``version``, for each shard; it is let go."""
        waiting, self._waiting = self._waiting, _Waiting(-1, [[] for _ in self.cuts])
        return waiting.given if waiting.version == version else self._waiting.given

    def _send_waiting(self) -> None:
        version = self._waiting.version
        for shard, given in zip(self._shards(), self._given(version), strict=True):
            self._sure += [shard.add.remote(version, *one) for one in given]

    def snapshot(self) -> dict[str, Any]:
        """Of all shards at one version."""
        # A consistent cut: calls of one caller are in order, and none commits in between.
        return joined_snapshot(self._got([s.snapshot.remote() for s in self._shards()]))

    def nodes(self) -> set[str]:
        """Where the shards are."""
        return set(self._homes)

    def close(self) -> None:
        """Ends the actors."""
        for actor in [*(g.actor for g in self._node_sums.values()), *self._shards()]:
            kill(actor)

    def _all_came(self, messages: Sequence[_Sent]) -> bool:
        """Whether nothing was lost on its way, asked of all at once, which costs a fraction of asking each."""
        try:
            ray.get([ref for message in messages for ref in message.refs], timeout=self._timeout_s)
        except RayError:
            return False
        return True

    def _failed(self, message: _Sent) -> bool:
        """Whether gradients were lost before they came to the server; raises if the server is."""
        for ref in message.refs:
            try:
                ray.get(ref, timeout=self._timeout_s)
            except GetTimeoutError as e:
                raise self._silent(self._timeout_s) from e
            except RayTaskError as e:
                if not isinstance(cause_of(e), RayError):
                    raise cause_of(e) from e
                return True
            except RayError:
                self._got([s.version.remote() for s in self._shards()])
                return True
        return False

    def _got(self, refs: Any, timeout_s: float | None = None) -> Any:
        timeout_s = timeout_s or self._timeout_s
        try:
            return ray.get(refs, timeout=timeout_s)
        except GetTimeoutError as e:
            raise self._silent(timeout_s) from e
        except RayTaskError as e:
            raise cause_of(e) from e
        except RayError as e:
            raise server_is_gone(e) from e

    def _silent(self, seconds: float) -> ServerLostError:
        return ServerLostError("parameter server", f"has not answered for {seconds:g} s")


def _threads(runtime: RuntimeConfig, size: int) -> int:
    """CPU threads of a shard with so many bytes of weights: workers of a node that wait for it leave it theirs."""
    waited_for = not runtime.max_staleness and runtime.quorum == 1.0
    if size < _LARGE or not waited_for:
        return runtime.threads_per_worker
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(runtime.threads_per_worker, min(_MOST_THREADS, processors // runtime.server_shards))


Part = ObjectRef | Shared
"""A shard's part of a vector: a reference to it, or where it lies in memory of the node."""


def areas_of(parts: Iterable[Part]) -> set[Area]:
    """The areas that these parts lie in."""
    return {part.area for part in parts if isinstance(part, Shared)}


def server_is_gone(error: RayError) -> ServerLostError:
    """The error of a server that cannot be reached any more, or of its weights."""
    return ServerLostError("parameter server", f"is gone ({first_line(error).split('. ')[0]})")


def cause_of(error: RayTaskError) -> BaseException:
    """The error as it was raised in the actor."""
    cause = error.cause if isinstance(getattr(error, "cause", None), BaseException) else None
    return cause if cause is not None else error


def kill(actor: ActorHandle) -> None:
    """Ends an actor, whatever state it is in."""
    with contextlib.suppress(Exception):
        ray.kill(actor)
