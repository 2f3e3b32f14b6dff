"""The parameter server on a cluster, as the driver sees it: one server, of shards that are actors.

What is sent to it goes by reference, from where it was computed; the driver holds references alone.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metadist.config.schema import RuntimeConfig, WorkersRange
from metadist.outer.partition import cut, joined_snapshot, part_of_options, part_of_snapshot
from metadist.outer.update import norm_of
from metadist.rounds import Lease, sums_of
from metadist.runtime.messages import packed, unpacked
from metadist.runtime.ray_calls import Shards, cause_of, kill, silent
from metadist.runtime.ray_shard import Commit, Given, NodeSum, Shard, Squares
from metadist.runtime.shared import Area, Shared
from metadist.runtime.transport import Transport

_START_TIMEOUT_S = 60.0
_MOST_AT_ONCE = 16
"""Small gradients in one message."""
_LARGE, _MOST_THREADS = 1 << 24, 8
"""Bytes of weights from which a shard uses more threads than a worker, and how many: then memory is no faster."""
_MOST_WITHIN = 8_000_000
"""Bytes that all answers of one call may take within its message; Ray's own limit is 10 MB."""


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
    given: list[list[Given]]


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
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        spread = len(self.cuts) > 1 and not isinstance(runtime.workers, WorkersRange)
        where = {**self._placing, "scheduling_strategy": "SPREAD" if spread else here}
        actors: list[ActorHandle] = []
        for a, z in self.cuts:
            part, options = part_of_snapshot(snapshot, a, z), part_of_options(outer, a, z)
            made = Shard.options(**where).remote(  # type: ignore[attr-defined]
                part, options, _threads(runtime, part["weights"].nbytes), transport
            )
            actors.append(made)
        self._shards = Shards(actors, self._timeout_s)
        self._ready: list[ObjectRef] = [shard.ready.remote() for shard in self._shards.actors()]
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
        ready = self._shards.got(self._ready, max(_START_TIMEOUT_S, self._timeout_s))
        self._shards.homes, self._shown = [node for node, _ in ready], [shown for _, shown in ready]
        self._note_pages(self._first_version)

    def offers(self, node: str) -> list[Shared | None]:
        """Of each shard what a process of ``node`` may try to open, if it is on that node."""
        return [
            shown if home == node else None
            for home, shown in zip(self._shards.homes or [""] * len(self.cuts), self._shown, strict=True)
        ]

    def weights(self, near: Sequence[bool]) -> list[Part]:
        """The present version's weights, of each shard where they lie or a reference to them.

        Args:
            near: whether who asks can open the shard's memory.
        """
        found: list[Part] = []
        for i in range(len(self.cuts)):
            shown, stored = self._shown[i], self._stored[i]
            if near[i] and shown is not None:
                found.append(shown)
                continue
            self._asked_far = True
            self._stored[i] = stored = self._shards.actor(i).weights.remote() if stored is None else stored
            found.append(stored)
        return found

    def forget(self, pid: int) -> None:
        """Closes what was opened of a process that has ended, once what waits has come."""
        self._send_waiting()
        self._opened = {area for area in self._opened if area.pid != pid}
        for shard in self._shards.actors():
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
        columns = zip(self._shards.actors(), zip(*given, strict=True), strict=True)
        return [shard.add.remote(version, count, slot, weight, *column) for shard, column in columns]

    def add_on_node(self, node: str, lease: Lease, version: int, count: int, parts: Sequence[Part]) -> None:
        """Sends a lease's gradients to the sums of the node they are on, which go on with :meth:`pass_on`."""
        if node not in self._node_sums:
            on_it = NodeAffinitySchedulingStrategy(node, soft=False)
            where = {**self._placing, "scheduling_strategy": on_it}
            made = NodeSum.options(**where).remote(self._transport)  # type: ignore[attr-defined]
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
                self._shards.got([s.retract.remote(message.slot) for s in self._shards.actors()])
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
            asked, _ = self._shards.ask([packed(Squares(g, version, tasks, slots)) for g in given])
            squares = map(unpacked, self._shards.told(asked))
            norm, given = norm_of(itertools.chain(*squares)), [[] for _ in self.cuts]
        far = self._asked_far
        # The last of them, in which the weights lie, if nobody reads it.
        pages = [next((p for p, of in reversed(pages) if of not in read), None) for pages in self._pages]
        commits = [
            packed(Commit(g, version, tasks, norm, slots, page, far))
            for g, page in zip(given, pages, strict=True)
        ]
        asked, self._stored = self._shards.ask(commits, far)
        self._asked_far = False
        told = [unpacked(message) for message in self._shards.told(asked, sure)]
        self._shown = [shown for _, shown in told]
        self._note_pages(version + 1)
        self._shards.begin_anew()
        stats: dict[str, float] = told[-1][0]
        return stats

    def _note_pages(self, version: int) -> None:
        for pages, shown in zip(self._pages, self._shown, strict=True):
            if shown is not None:
                pages[:] = [(page, of) for page, of in pages if page.area != shown.area] + [(shown, version)]

    def _given(self, version: int) -> list[list[Given]]:
        """What waits for the update of ``version``, for each shard; it is let go."""
        waiting, self._waiting = self._waiting, _Waiting(-1, [[] for _ in self.cuts])
        return waiting.given if waiting.version == version else self._waiting.given

    def _send_waiting(self) -> None:
        version = self._waiting.version
        for shard, given in zip(self._shards.actors(), self._given(version), strict=True):
            self._sure += [shard.add.remote(version, *one) for one in given]

    def snapshot(self) -> dict[str, Any]:
        """Of all shards at one version."""
        # A consistent cut: calls of one caller are in order, and none commits in between.
        return joined_snapshot(self._shards.got([s.snapshot.remote() for s in self._shards.actors()]))

    def nodes(self) -> set[str]:
        """Where the shards are."""
        return set(self._shards.homes)

    def close(self) -> None:
        """Ends the actors."""
        for actor in [*(g.actor for g in self._node_sums.values()), *self._shards.actors()]:
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
                raise silent(self._timeout_s) from e
            except RayTaskError as e:
                if not isinstance(cause_of(e), RayError):
                    raise cause_of(e) from e
                return True
            except RayError:
                self._shards.got([s.version.remote() for s in self._shards.actors()])
                return True
        return False


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
