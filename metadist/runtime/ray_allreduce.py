"""An all-reduce run over Ray: the workers hold the parameter server between them, and exchange by torch.distributed.

For fixed membership: when a worker dies, all are started anew, at the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayError, RayTaskError

from metadist.allreduce import Member, Update, join, meeting_place
from metadist.errors import ServerLostError, first_line
from metadist.experiment import Experiment
from metadist.outer.partition import joined_snapshot
from metadist.rounds import Lease
from metadist.runtime.backend import Died, Event
from metadist.runtime.messages import packed
from metadist.runtime.ray import RayBackend
from metadist.runtime.ray_answers import Handle
from metadist.runtime.ray_calls import cause_of
from metadist.runtime.ray_worker import WorkerProcess


@ray.remote
class _Member(WorkerProcess):
    def meeting_place(self) -> tuple[str, int]:
        """Where the others find this one, the first of them."""
        host = ray.util.get_node_ip_address()
        self._store = meeting_place(host)
        return host, self._store.port

    def join(
        self,
        place: tuple[str, int],
        rank: int,
        world: int,
        snapshot: dict[str, Any],
        outer: dict[str, Any],
        ordered: bool,
        timeout_s: float,
    ) -> None:
        join(*place, rank, world, timeout_s, self._store if rank == 0 else None)
        self._member = Member(self._worker, snapshot, outer, rank, world, ordered)

    def compute(self, lease: Lease) -> bytes:
        return packed((self._member.compute(lease), []))

    def drop(self, number: int) -> None:
        self._member.drop(number)

    def update(self, update: Update) -> dict[str, float]:
        return self._member.update(update)

    def snapshot(self) -> dict[str, Any] | None:
        return self._member.snapshot()


class AllReduceBackend(RayBackend):
    """``runtime.workers`` workers on a Ray cluster, each with a part of the parameter server.

    Args:
        experiment, make_worker: as of :class:`RayBackend`.

    Raises:
        ClusterError: the cluster cannot be reached or has not the GPUs asked for.
    """

    _kind: Any = _Member

    def __init__(self, experiment: Experiment, *rest: Any) -> None:
        self._ranks: list[Handle] = []
        self._accepted: list[list[Lease]] = []
        self._count = 0
        super().__init__(experiment, *rest)

    def start(self, snapshot: dict[str, Any], outer: dict[str, Any]) -> None:
        self._experiment_ref, self._outer = ray.put(self._experiment), outer
        self._begin(self._workers)
        ranks = [self._handles[n] for n in self.workers()]
        actors = [handle.line.by_ray() for handle in ranks]
        place = self._got([actors[0].meeting_place.remote()])[0]
        shared, ordered = ray.put(snapshot), self._runtime.topology == "allreduce"
        self._got([
            actor.join.remote(place, rank, len(actors), shared, outer, ordered, self._runtime.lease_timeout_s)
            for rank, actor in enumerate(actors)
        ])  # fmt: skip
        self._ranks, self._accepted = ranks, [[] for _ in ranks]

    def accept(self, lease: Lease, version: int, count: int, slot: int | None = None, weight: float = 1.0) -> None:
        assert slot is None and weight == 1.0, "an all-reduce run waits for its meta-batch"
        handle, _ = self._answered.pop(lease.number)
        self._accepted[self._ranks.index(handle)].append(lease)
        self._count = count

    def drop(self, lease: Lease) -> None:
        if lease.number in self._answered:
            handle, _ = self._answered.pop(lease.number)
            handle.line.by_ray().drop.remote(lease.number)

    def settle(self) -> list[Lease]:
        return []  # gradients go with the update

    def commit(
        self,
        version: int,
        tasks: float,
        slots: Sequence[int] | None = None,
    ) -> dict[str, float]:
        update = Update(version, self._count, tasks, slots, self._accepted)
        self._accepted = [[] for _ in self._ranks]
        told = self._got([handle.line.by_ray().update.remote(update) for handle in self._ranks])
        return next(stats for stats in told if stats)

    def snapshot(self) -> dict[str, Any]:
        parts = self._got([handle.line.by_ray().snapshot.remote() for handle in self._ranks])
        if self._runtime.topology != "allreduce":
            return dict(parts[0])  # all have the whole of it
        return joined_snapshot([part for part in parts if part is not None])

    def restore(self, snapshot: dict[str, Any], error: ServerLostError) -> None:
        self._note("server", error.problem)
        # The group is broken for all of its members, and each holds a part of the server.
        for handle in self._handles.values():
            handle.end()
        self._handles.clear()
        self._answered.clear()
        self._ranks = []
        self.start(snapshot, self._outer)

    def describe(self) -> dict[str, Any]:
        told = {**super().describe(), "topology": self._runtime.topology}
        del told["server_shards"]
        return told

    def _ask(self, handle: Handle, lease: Lease) -> tuple[ObjectRef, list[Any], list[ObjectRef]]:
        return handle.line.by_ray().compute.remote(lease), [], []

    def _leave(self) -> list[Event]:
        return []

    def _replace(self, number: int, reason: str, expected: bool = False) -> Died:
        if not self._ranks:
            return super()._replace(number, reason, expected)
        raise self._lost(f"worker {number} is gone ({reason})")

    def _got(self, refs: list[ObjectRef]) -> list[Any]:
        """What all members answer; fails with the first that does, while others may wait for it."""
        waiting = list(refs)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            try:
                ray.get(done)
            except RayTaskError as e:
                cause = cause_of(e)
                # What gloo says when another member is gone.
                raise self._lost(first_line(cause)) if type(cause) is RuntimeError else cause from e
            except RayError as e:
                raise self._lost(first_line(e)) from e
        return list(ray.get(refs))

    @staticmethod
    def _lost(reason: str) -> ServerLostError:
        return ServerLostError("runtime", f"a member of the all-reduce run is lost: {reason}")
