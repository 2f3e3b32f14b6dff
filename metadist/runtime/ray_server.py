"""The parameter server as Ray actors: its shards, and sums that are made on the nodes where gradients are.

What is sent to it goes by reference, from where it was computed; the driver holds references alone.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
from metadist.runtime.transport import Transport
from metadist.server import ParameterServer

_START_TIMEOUT_S = 60.0
_MOST_AT_ONCE = 16
"""Small gradients in one message."""
_MOST_WITHIN = 8_000_000
"""Bytes that all answers of one call may take within its message; Ray's own limit is 10 MB."""


@ray.remote
class _Shard:
    def __init__(self, snapshot: dict[str, Any], options: dict[str, Any], threads: int, transport: Transport) -> None:
        # Views: what an actor returns is in the object store before its next call begins.
        self._server, self._transport = ParameterServer.at(snapshot, options, threads, views=True), transport

    def ready(self) -> str:
        """The node it is on."""
        self._transport.check()
        return str(ray.get_runtime_context().get_node_id())

    def weights(self) -> np.ndarray:
        return self._server.weights()

    def version(self) -> int:
        return self._server.version

    def retract(self, slot: int) -> None:
        self._server.retract(slot)

    def add(self, version: int, count: int, slot: int | None, weight: float, *parts: Any) -> int:
        given = (placed(_unpacked(self._transport, packed), slot, weight) for packed in parts)
        return sum(self._server.add(version, count, blocks) for blocks in given)

    def squares(self, version: int, tasks: float, slots: Sequence[int] | None) -> list[float]:
        return self._server.squares(version, tasks, slots)

    def commit(
        self, version: int, tasks: float, norm: float | None, slots: Sequence[int] | None
    ) -> tuple[np.ndarray, dict[str, float]]:
        return self._server.commit(version, tasks, norm, slots)

    def snapshot(self) -> dict[str, Any]:
        return self._server.snapshot()


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
        for tree, packed in zip(self._sums, parts, strict=True):
            for block, value in _unpacked(self._transport, packed).items():
                tree.add(block, value)

    def give(self, version: int) -> Any:
        """What has come so far, summed as far as it goes: for each shard of the server. It is let go."""
        if version != self._version:
            raise ValueError(f"asked for the sums of version {version}, but version {self._version} is here")
        sums, self._sums, self._version = self._sums, [], -1
        packed = tuple(self._transport.pack(tree.held()) for tree in sums)
        return packed if len(packed) > 1 else packed[0]


def _unpacked(transport: Transport, packed: Any) -> dict[Block, np.ndarray]:
    return {block: widened(value) for block, value in transport.unpack(packed).items()}


@dataclass
class _Sent:
    """Messages on their way, and the leases whose gradients are in them."""

    refs: list[ObjectRef]
    leases: list[Lease]
    slot: int | None = None


@dataclass
class _Batch:
    """Gradients for an update, some for each shard of the server, which go with the next message."""

    version: int
    count: int
    parts: list[Sequence[ObjectRef]] = field(default_factory=list)


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
            with others, in one message, and cannot be lost on its way: nobody waits until it has come.

    ``weights`` are references to the present version's weights, one for each of ``cuts`` of the flat vector.
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
        self._node_sums: dict[str, _Gathering] = {}
        # Shards compute nothing to speak of but move much: each on another node, as far as there are nodes. Where nodes
        # come and go they stay on the driver's, without which the run would end anyway.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        spread = len(self.cuts) > 1 and not isinstance(runtime.workers, WorkersRange)
        where = {**self._placing, "scheduling_strategy": "SPREAD" if spread else here}
        self._shards: list[ActorHandle] = []
        for a, z in self.cuts:
            part, options = part_of_snapshot(snapshot, a, z), part_of_options(outer, a, z)
            made = _Shard.options(**where).remote(  # type: ignore[attr-defined]
                part, options, runtime.threads_per_worker, transport
            )
            self._shards.append(made)
        self._nodes: list[ObjectRef] = [shard.ready.remote() for shard in self._shards]
        self.weights: list[ObjectRef] = [shard.weights.remote() for shard in self._shards]

    def wait(self) -> None:
        """Waits until it has started, which may take longer than any later answer.

        Raises:
            ServerLostError: it did not.
        """
        self._got(self._nodes, max(_START_TIMEOUT_S, self._timeout_s))

    def add(
        self,
        lease: Lease,
        version: int,
        count: int,
        parts: Sequence[ObjectRef],
        slot: int | None = None,
        weight: float = 1.0,
    ) -> None:
        """Sends each shard its part of what a lease gave; the rest as of ``Backend.accept``."""
        if sums_of(range(lease.start, lease.stop), lease.round.microbatches) > self._small:
            self._sent.append(_Sent(self._add(version, count, slot, weight, [parts]), [lease], slot))
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
        self, version: int, count: int, slot: int | None, weight: float, given: list[Sequence[ObjectRef]]
    ) -> list[ObjectRef]:
        columns = zip(self._shards, zip(*given, strict=True), strict=True)
        return [shard.add.remote(version, count, slot, weight, *column) for shard, column in columns]

    def add_on_node(self, node: str, lease: Lease, version: int, count: int, parts: Sequence[ObjectRef]) -> None:
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
        given: Any = gathering.actor.give.options(num_returns=len(self._shards)).remote(gathering.version)
        parts = list(given) if len(self._shards) > 1 else [given]
        # Whatever their size: they are on their way from a node that may be gone.
        self._sent.append(_Sent(self._add(gathering.version, gathering.count, None, 1.0, [parts]), leases))

    def settle(self) -> list[Lease]:
        """See :meth:`metadist.runtime.backend.Backend.settle`."""
        for node in self._node_sums:
            self.pass_on(node)
        self.send_batch()
        sent, self._sent = self._sent, []
        lost: dict[int, Lease] = {}
        for message in [] if self._all_came(sent) else sent:
            if self._failed(message):
                lost |= {lease.number: lease for lease in message.leases}
                if message.slot is not None:
                    # Some shards may have it, and another gradient will take its place.
                    self._got([s.retract.remote(message.slot) for s in self._shards])
        if lost:
            self._node_sums.clear()
        return [lost[number] for number in sorted(lost)]

    def commit(self, version: int, tasks: float, slots: Sequence[int] | None = None) -> dict[str, float]:
        """See :meth:`metadist.runtime.backend.Backend.commit`."""
        sure, self._sure = self._sure, []
        norm = None
        if len(self._shards) > 1:
            squares = [s.squares.remote(version, tasks, slots) for s in self._shards]
            norm = norm_of(itertools.chain(*self._got(squares)))
        made: list[Any] = [s.commit.options(num_returns=2).remote(version, tasks, norm, slots) for s in self._shards]
        told: list[Any] = self._got(sure + [stats for _, stats in made])
        self.weights = [weights for weights, _ in made]
        result: dict[str, float] = told[-1]
        return result

    def snapshot(self) -> dict[str, Any]:
        """Of all shards at one version."""
        # A consistent cut: calls of one caller are in order, and none commits in between.
        return joined_snapshot(self._got([s.snapshot.remote() for s in self._shards]))

    def nodes(self) -> set[str]:
        """Where the shards are."""
        return set(self._got(self._nodes))

    def close(self) -> None:
        """Ends the actors."""
        for actor in [*(g.actor for g in self._node_sums.values()), *self._shards]:
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
                self._got([s.version.remote() for s in self._shards])
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
