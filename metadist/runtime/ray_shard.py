"""The actors of a parameter server: its shards, and sums that are made on the nodes where gradients are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import ray

from metadist.outer.gradient import Block, TreeSum, placed
from metadist.outer.wire import widened
from metadist.runtime import channel
from metadist.runtime.messages import packed, unpacked
from metadist.runtime.shared import Reader, Shared, Writer, can_share
from metadist.runtime.transport import Transport
from metadist.server import ParameterServer

Given = tuple[int, int | None, float, Shared]
"""A gradient in memory of the node: microbatches of the update, its place in the sum and its weight, where it lies."""


class Squares(NamedTuple):
    """What a shard of several is asked before an update.

    Args:
        given: gradients that have not been sent.
        version, tasks, slots: as of :meth:`metadist.server.ParameterServer.squares`.
    """

    given: list[Given]
    version: int
    tasks: float
    slots: Sequence[int] | None


class Commit(NamedTuple):
    """What a shard is asked to make an update of.

    Args:
        given: gradients that have not been sent.
        version, tasks, norm, slots: as of :meth:`metadist.server.ParameterServer.commit`.
        page: where processes of the shard's node are to find the weights, which may be where they are; None: in a new
            place. Nobody reads what is there.
        far: whether the weights are to be returned, for all others.
    """

    given: list[Given]
    version: int
    tasks: float
    norm: float | None
    slots: Sequence[int] | None
    page: Shared | None
    far: bool


@ray.remote
class Shard:
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
        """What a :class:`Squares` or a :class:`Commit` asks for.

        Returns:
            The sums of squares of the gradient's chunks; or the statistics and where the new weights lie for processes
            of this node, and beside these bytes the weights, if others want them.
        """
        order: Squares | Commit = unpacked(message)
        self._take(order.given, order.version)
        if isinstance(order, Squares):
            return packed(self._server.squares(order.version, order.tasks, order.slots))
        self._move_into(order.page)
        weights, stats = self._server.commit(order.version, order.tasks, order.norm, order.slots)
        told = packed((stats, self._page))
        return (told, weights) if order.far else told

    def _take(self, given: list[Given], version: int) -> None:
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
class NodeSum:
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
