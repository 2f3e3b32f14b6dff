"""Workers that are the parameter server themselves: each holds a part of it, and all exchange gradients and weights.

For fixed membership. What a server's actors send and receive, 2 |θ| for every worker through the links of a few, is
spread evenly over all (cf. Rabenseifner 2004, "Optimization of collective reduction operations"). A plain class over
``torch.distributed``; who starts it is another's business.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from metadist.outer.gradient import Block, TreeSum, partial_sums
from metadist.outer.partition import cut, part_of_options, part_of_snapshot
from metadist.outer.update import norm_of
from metadist.rounds import Lease, Report
from metadist.server import ParameterServer
from metadist.worker import LeaseWorker

_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915
"""Linux asks an interface for its address by this number."""


@dataclass(frozen=True)
class Update:
    """What a meta-update is made of; the same to all members.

    Args:
        version: that it makes the next of.
        count: microbatches of the meta-batch.
        tasks: over how many the mean is taken.
        slots: the places in the sum that are filled, if not all are.
        accepted: for each member, by rank, its leases that count, in order.
    """

    version: int
    count: int
    tasks: float
    slots: Sequence[int] | None
    accepted: Sequence[Sequence[Lease]]


class Member:
    """One rank of an all-reduce run: computes leases, and holds a part of the server.

    Ordered, a member sends every other the part of its partial sums that is the other's to add up, in the tree's
    order: the bits are those of a server. Not ordered, each adds up what is its own, ``all_reduce`` adds those sums in
    an order of its own, and the bits depend on the number of members and on who computed what.

    Args:
        worker: that computes.
        snapshot, outer: as of :class:`metadist.server.ParameterServer` and its options.
        rank, world: of the process group, which is there.
        ordered: whether the bits are kept.
    """

    def __init__(
        self,
        worker: LeaseWorker,
        snapshot: Mapping[str, Any],
        outer: dict[str, Any],
        rank: int,
        world: int,
        ordered: bool = True,
    ) -> None:
        self._worker, self._rank, self._world, self._ordered = worker, rank, world, ordered
        numel = len(snapshot["weights"])
        cuts = cut(outer["sizes"], world) if ordered else [(0, numel)] * world
        self.cuts = cuts + [(numel, numel)] * (world - len(cuts))
        start, stop = self.cuts[rank]
        self._server: ParameterServer | None = None
        if start < stop:
            part, options = part_of_snapshot(snapshot, start, stop), part_of_options(outer, start, stop)
            self._server = ParameterServer.at(part, options)
        self.weights = np.array(snapshot["weights"])
        self._held: dict[int, dict[Block, np.ndarray]] = {}

    def compute(self, lease: Lease) -> Report:
        """The lease's report; its gradients stay here until :meth:`update` or :meth:`drop`."""
        report, blocks = self._worker.compute(lease, [self.weights])
        if lease.round.kind == "train":
            self._held[lease.number] = blocks
        return report

    def drop(self, number: int) -> None:
        """Lets go of the gradients of a lease."""
        self._held.pop(number, None)

    def update(self, update: Update) -> dict[str, float]:
        """Makes the next version, in every member at once; returns the update's statistics.

        Raises:
            FloatingPointError: the gradient is not finite, in all members; the version stays as it was.
            RuntimeError: another member failed, or is gone.
        """
        mine = [self._held.pop(lease.number) for lease in update.accepted[self._rank]]
        return (self._ordered_update if self._ordered else self._plain_update)(update, _summed(mine, update.count))

    def snapshot(self) -> dict[str, Any] | None:
        """Of this member's part; None where there is none."""
        return None if self._server is None else self._server.snapshot()

    def _plain_update(self, update: Update, mine: Mapping[Block, np.ndarray]) -> dict[str, float]:
        total = torch.zeros(len(self.weights), dtype=torch.from_numpy(self.weights).dtype)
        for value in mine.values():
            total += torch.from_numpy(value)
        dist.all_reduce(total)
        assert self._server is not None
        self._server.add(update.version, 1, {Block(0, 0): total.numpy()})
        self.weights, stats = self._server.commit(update.version, update.tasks)
        return stats

    def _ordered_update(self, update: Update, mine: Mapping[Block, np.ndarray]) -> dict[str, float]:
        received = self._exchanged(mine, [_blocks(leases, update.count) for leases in update.accepted])
        squares: list[float] | FloatingPointError = []
        if self._server is not None:
            try:
                for block, value in received:
                    self._server.add(update.version, update.count, {block: value})
                squares = self._server.squares(update.version, update.tasks, update.slots)
            except FloatingPointError as e:
                squares = e
        norm = norm_of(self._all_squares(squares))
        if self._server is not None:
            part, stats = self._server.commit(update.version, update.tasks, norm, update.slots)
        else:
            part, stats = self.weights[:0], {}
        self.weights = self._all_weights(part)
        return stats

    def _exchanged(
        self, mine: Mapping[Block, np.ndarray], blocks: Sequence[Sequence[Block]]
    ) -> list[tuple[Block, np.ndarray]]:
        """This member's part of everybody's partial sums, by one exchange of each with each.

        Args:
            mine: this member's partial sums ``[numel]``.
            blocks: which each member has.
        """
        own = blocks[self._rank]
        pieces = [mine[b][a:z] for a, z in self.cuts for b in own]
        send = torch.from_numpy(np.concatenate(pieces) if pieces else self.weights[:0].copy())
        start, stop = self.cuts[self._rank]
        width = stop - start
        counts = [len(theirs) * width for theirs in blocks]
        received = torch.empty(sum(counts), dtype=send.dtype)
        dist.all_to_all_single(received, send, counts, [len(own) * (z - a) for a, z in self.cuts])
        if not width:
            return []
        return list(zip(itertools.chain(*blocks), received.numpy().reshape(-1, width), strict=True))

    def _all_squares(self, squares: list[float] | FloatingPointError) -> list[float]:
        """Those of all members in their order; raises in all of them if there are none in one."""
        told: list[Any] = [None] * self._world
        dist.all_gather_object(told, squares)
        for found in told:
            if isinstance(found, FloatingPointError):
                raise found
        return list(itertools.chain(*told))

    def _all_weights(self, part: np.ndarray) -> np.ndarray:
        """The vector ``[numel]`` of everybody's part."""
        widest = max(z - a for a, z in self.cuts)
        padded = torch.zeros(widest, dtype=torch.from_numpy(self.weights).dtype)
        padded[: len(part)] = torch.from_numpy(part)
        everything = torch.empty(self._world * widest, dtype=padded.dtype)
        dist.all_gather_into_tensor(everything, padded)
        rows = everything.numpy().reshape(self._world, widest)
        return np.concatenate([row[: z - a] for row, (a, z) in zip(rows, self.cuts, strict=True)])


def meeting_place(host: str) -> dist.TCPStore:
    """Where the members of a group find one another: a store in this process, at a port that is free (``.port``).

    It listens from now on: a port that was only looked for could be another process's by the time it is told.

    Args:
        host: an address of this machine.
    """
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)


def join(host: str, port: int, rank: int, world: int, timeout_s: float, store: dist.TCPStore | None = None) -> None:
    """Makes this process a rank of a gloo group whose :func:`meeting_place` is at ``host:port``.

    The others reach it by the network that leads there; by that of ``GLOO_SOCKET_IFNAME``, if that is set.

    Args:
        host, port: of the meeting place.
        rank, world: of this process, and how many there are.
        timeout_s: after how much silence of the others an exchange fails.
        store: the meeting place, if it is in this process.
    """
    timeout = timedelta(seconds=timeout_s)
    with _gloo_by(_interface_to(host, port)):
        store = dist.TCPStore(host, port, is_master=False, timeout=timeout) if store is None else store
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)


def _interface_to(host: str, port: int) -> str:
    """The network interface by which this process reaches a host; empty where the system does not tell.

    Left to itself gloo takes the address that the host's own name stands for, which on many a system is a loopback.
    """
    with contextlib.suppress(OSError, ImportError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        import fcntl

        way.connect((host, port))  # sends nothing
        own = socket.inet_aton(way.getsockname()[0])
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                told = fcntl.ioctl(way.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if told[20:24] == own:
                    return name
    return ""


@contextlib.contextmanager
def _gloo_by(interface: str) -> Iterator[None]:
    """Gloo groups that are made meanwhile use an interface, unless the user has named one."""
    if not interface or _INTERFACE in os.environ:
        yield
        return
    os.environ[_INTERFACE] = interface
    try:
        yield
    finally:
        del os.environ[_INTERFACE]


def _summed(blocks: Iterable[Mapping[Block, np.ndarray]], count: int) -> dict[Block, np.ndarray]:
    """Partial sums of several leases, summed as far as the tree allows."""
    tree = TreeSum(count)
    for some in blocks:
        for block, value in some.items():
            tree.add(block, value)
    return tree.held()


def _blocks(leases: Sequence[Lease], count: int) -> list[Block]:
    """What :func:`_summed` makes of the partial sums of ``leases``, in its order."""
    nothing = np.zeros(1, np.float32)
    return list(_summed((partial_sums(n.start, [nothing] * (n.stop - n.start), count) for n in leases), count))
