"""What the controller asks of the place where workers and server live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from metadist.errors import ServerLostError
from metadist.rounds import Lease, Report

# glibc hands large temporaries back to the system at once and pays for them again at each step.
ALLOCATOR = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.top_pad=67108864"
"""``GLIBC_TUNABLES`` of worker processes."""

WITHIN_MESSAGES = 1_000_000
"""Bytes of an array that goes within messages on a Ray started here, a Conv4's gradient among them.

Through the object store it costs every process on its way another exchange with Ray's own.
"""


@dataclass(frozen=True)
class Computed:
    """A lease is answered. What it gave of gradients waits to be accepted or dropped."""

    worker: int
    report: Report


@dataclass(frozen=True)
class Died:
    """A worker is gone; a replacement may be on its way."""

    worker: int
    reason: str


@dataclass(frozen=True)
class Left:
    """A worker was let go of between two leases; another may come in its place."""

    worker: int
    reason: str


@dataclass(frozen=True)
class Joined:
    """A worker is ready for leases."""

    worker: int


@dataclass(frozen=True)
class Moved:
    """Something other than a worker has gone to another node, between two updates."""

    what: str
    reason: str


Event = Computed | Died | Left | Joined | Moved


class Backend(Protocol):
    """Workers and a parameter server, in this process or over Ray.

    Calls come from one thread. Workers are known by numbers that are never used twice.
    """

    def start(self, snapshot: dict[str, Any], outer: dict[str, Any]) -> None:
        """Brings up the server at a snapshot, and the workers; returns when one of them is ready.

        Args:
            snapshot: see :meth:`metadist.server.ParameterServer.snapshot`.
            outer: options of the meta-update.
        """

    def idle(self) -> list[int]:
        """Workers that are ready and compute nothing, in order of their numbers."""

    def workers(self) -> list[int]:
        """Workers that are ready, busy or not."""

    def lease(self, worker: int, lease: Lease) -> None:
        """Starts computing a lease with the weights of the server's present version."""

    def wait(self, timeout: float) -> list[Event]:
        """What has happened since the last call; waits up to ``timeout`` seconds for something.

        Raises:
            MetadistError: a worker's own error, or too many deaths.
        """

    def dismiss(self, worker: int, reason: str) -> Died:
        """Ends a worker that answers no more; a replacement may come.

        Raises:
            MetadistError: too many have gone.
        """

    def accept(self, lease: Lease, version: int, count: int, slot: int | None = None, weight: float = 1.0) -> None:
        """Sends the server the gradients of an answered training lease.

        Args:
            lease: which.
            version: the server's, for whose update they are.
            count: microbatches of the update.
            slot: the place in the sum of the lease's one microbatch, if that is not its number in its round.
            weight: what they are multiplied by.
        """

    def drop(self, lease: Lease) -> None:
        """Lets go of the gradients of an answered lease."""

    def settle(self) -> list[Lease]:
        """Waits until what was accepted has come to the server, but for what cannot be lost on its way.

        Returns:
            The leases of which it did not come, and never will.
        """

    def commit(
        self,
        version: int,
        tasks: float,
        slots: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Makes the next version of the gradients that were accepted and have settled; returns the update's statistics.

        Args:
            version: the server's.
            tasks: over how many the mean is taken; weighted ones count for their weight.
            slots: the places in the sum that are filled, if not all are.
        """

    def restore(self, snapshot: dict[str, Any], error: ServerLostError) -> None:
        """Brings up the server again, at a snapshot; workers that compute go on, for answers that nobody waits for.

        Args:
            snapshot: of a version the run goes back to.
            error: that the server was lost with.

        Raises:
            ClusterError: it was lost too often.
        """

    def snapshot(self) -> dict[str, Any]:
        """The server's state (see :meth:`metadist.server.ParameterServer.snapshot`)."""

    def restarts(self) -> dict[str, int]:
        """How many of each kind of process were replaced."""

    def describe(self) -> dict[str, Any]:
        """What the run keeps of the place: device, threads, versions."""

    def close(self) -> None:
        """Lets everything go."""
