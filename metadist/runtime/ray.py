"""The backend that leases to workers on a Ray cluster.

The driver owns leases and membership and waits for answers; weights and gradients go between workers and server
without passing through it. Workers are replaced, never restarted, so that nothing runs twice behind the controller's
back.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from metadist.config.schema import WorkersRange
from metadist.errors import ClusterError, MetadistError, ServerLostError, first_line
from metadist.experiment import Experiment
from metadist.progress import Progress
from metadist.rounds import Lease
from metadist.runtime import channel
from metadist.runtime.backend import Computed, Died, Event, Joined, Left, Moved
from metadist.runtime.channel import Line
from metadist.runtime.cluster import connect, draining_nodes, plan_workers, room_for_workers, within_messages
from metadist.runtime.messages import packed, unpacked
from metadist.runtime.ray_answers import Handle, arrived
from metadist.runtime.ray_calls import cause_of, server_is_gone
from metadist.runtime.ray_server import Part, RayServer, areas_of
from metadist.runtime.ray_worker import Cut, MakeWorker, Order, Worker
from metadist.runtime.recovery import GiveUp, Kind, Limits, Loss, Losses
from metadist.runtime.shared import Shared
from metadist.runtime.transport import transport_named
from metadist.worker import MetaWorker

_REACH_S = 0.1
"""How long a worker that is ready is waited for, once, to say whether it can open the server's memory."""
_MEMBERSHIP_S = 1.0


class RayBackend:
    """A parameter server and ``runtime.workers`` workers on a Ray cluster, one started here if none is named.

    The server is ``runtime.server_shards`` actors, each with a part of the flat vector; workers send each its part, or
    with ``runtime.node_sums`` one actor of each node sends what its workers computed. Of a range of workers the most
    are asked for at once: those that find no room wait as pending actors, which is also what an autoscaler looks at,
    begin where a node joins, and are withdrawn at the end. ``auto`` asks for what fits the cluster as it is, and for
    more when there is room for more. Workers of a node that is being drained take no new lease and leave after the one
    they hold.

    Args:
        experiment: what is run, with ``engine.strategy`` decided.
        make_worker: ``make_worker(experiment, device)``, called in each worker's process.

    Raises:
        ClusterError: the cluster cannot be reached or has not the GPUs asked for.
    """

    _kind: Any = Worker

    def __init__(self, experiment: Experiment, make_worker: MakeWorker = MetaWorker) -> None:
        self._experiment, self._make_worker = experiment, make_worker
        self._runtime = experiment.config.runtime
        self._transport = transport_named(self._runtime.transport)
        self._handles: dict[int, Handle] = {}
        self._answered: dict[int, tuple[Handle, list[Part]]] = {}
        self._accepted_parts: list[tuple[Handle, list[Part]]] = []
        self._membership_seen = 0.0
        self._next_worker = 0
        limits = Limits(
            self._runtime.max_worker_restarts, self._runtime.max_server_restarts, self._runtime.restart_window_s
        )
        self._losses = Losses(limits)
        self._unwanted: set[int] = set()
        self._draining: set[str] = set()
        self._moved: list[Event] = []
        self._server: RayServer | None = None
        self._grows = self._runtime.workers == "auto" and self._runtime.address is not None
        self._started_here = connect(self._runtime)
        self._here = ray.get_runtime_context().get_node_id()
        self._ending = False
        try:
            self._workers, self._gpus = plan_workers(self._runtime, ray.cluster_resources())
        except MetadistError:
            self.close()
            raise

    def start(self, snapshot: dict[str, Any], outer: dict[str, Any]) -> None:
        self._experiment_ref, self._outer = ray.put(self._experiment), outer
        self._server = self._new_server(snapshot)
        self._begin(self._runtime.workers.min if isinstance(self._runtime.workers, WorkersRange) else 1)
        try:
            self.server.wait()
        except ServerLostError as e:
            self.restore(snapshot, e)

    def _begin(self, wanted: int) -> None:
        """Asks for all workers, and waits until ``wanted`` of them are ready."""
        for _ in range(self._workers):
            self._hire()
        there, since, timeout_s = 0, time.monotonic(), self._runtime.start_timeout_s
        with Progress("waiting for workers,") as progress:
            while there < wanted:
                if time.monotonic() - since > timeout_s:
                    raise ClusterError(
                        "runtime",
                        f"{there or 'no'} worker{'s' * (there != 1)} became ready, {wanted} wanted, and no other came "
                        f"in {timeout_s:g} s (runtime.start_timeout_s)",
                        "see what the cluster has with `ray status`, lower runtime.workers, or wait longer",
                    )
                self.wait(1.0)
                if len(self.workers()) != there:
                    there, since = len(self.workers()), time.monotonic()
                progress(min(there, wanted), wanted)

    def idle(self) -> list[int]:
        return [n for n, h in self._handles.items() if h.starting is None and not h.answers and not h.leaving]

    def workers(self) -> list[int]:
        return [n for n, h in self._handles.items() if h.starting is None]

    def nodes(self) -> dict[int, str]:
        """Ids of the nodes that the ready workers are on."""
        return {n: h.node for n, h in self._handles.items() if h.starting is None}

    def lease(self, worker: int, lease: Lease) -> None:
        handle = self._handles[worker]
        report, cuts, gradients = self._ask(handle, lease)
        handle.answers[report] = (lease, cuts, gradients)

    def _ask(self, handle: Handle, lease: Lease) -> tuple[ObjectRef, list[Cut], list[ObjectRef]]:
        """A reference to the report; the shards' parts; and references to what is for those that are not near."""
        near = self._near(handle)
        weights = self.server.weights(near)
        # Sums of a node take what comes by reference.
        cuts = [(a, z, n and not self._runtime.node_sums) for (a, z), n in zip(self.server.cuts, near, strict=True)]
        done, handle.done = handle.done, []
        order = packed(Order(lease, cuts, done, [part if isinstance(part, Shared) else None for part in weights]))
        stored = [part for part in weights if not isinstance(part, Shared)]
        far = sum(not is_near for _, _, is_near in cuts)
        if not far and not stored and handle.node == self._here and len(order) <= channel.MOST:
            over = handle.line.by_channel()
            if over is not None:
                over.ask(order)
                return over.call, cuts, []
        compute: Any = handle.line.by_ray().compute
        if not far:
            return compute.remote(order, *stored), cuts, []
        answers: list[ObjectRef] = compute.options(num_returns=1 + far).remote(order, *stored)
        return answers[0], cuts, answers[1:]

    def _near(self, handle: Handle) -> list[bool]:
        """Which shards a worker shares memory with; none, until it has said so itself."""
        wait_s = 0.0
        if handle.reached is not self.server:
            offers = self.server.offers(handle.node)
            handle.reached, handle.near, handle.reaching = self.server, [False] * len(offers), None
            if any(offers):
                handle.reaching, wait_s = handle.line.by_ray().reach.remote(offers), _REACH_S
        if handle.reaching is not None and ray.wait([handle.reaching], timeout=wait_s)[0]:
            # If it is gone, the lease will say so.
            with contextlib.suppress(RayError):
                handle.near = ray.get(handle.reaching)
            handle.reaching = None
        return handle.near

    def wait(self, timeout: float) -> list[Event]:
        answered = arrived(self._handles.values(), self._server, timeout)
        events: list[Event] = []
        for number, handle in list(self._handles.items()):
            for ref in [ref for ref in handle.awaited if ref in answered]:
                if number in self._handles:
                    events += self._heard(number, handle, ref, answered[ref])
        return events + self._leave()

    def accept(self, lease: Lease, version: int, count: int, slot: int | None = None, weight: float = 1.0) -> None:
        handle, parts = self._answered.pop(lease.number)
        self._accepted_parts.append((handle, parts))
        if not self._runtime.node_sums:
            self.server.add(lease, version, count, parts, slot, weight)
            return
        node = handle.node
        self.server.add_on_node(node, lease, version, count, parts)
        if not any(h.answers for h in self._handles.values() if h.node == node):
            self.server.pass_on(node)

    def drop(self, lease: Lease) -> None:
        if lease.number in self._answered:
            self._free([self._answered.pop(lease.number)])

    @staticmethod
    def _free(given: Iterable[tuple[Handle, list[Part]]]) -> None:
        """Nobody will read these any more."""
        for handle, parts in given:
            handle.done += areas_of(parts)

    def settle(self) -> list[Lease]:
        return self.server.settle()

    def commit(
        self,
        version: int,
        tasks: float,
        slots: Sequence[int] | None = None,
    ) -> dict[str, float]:
        read = {lease.round.version for h in self._handles.values() for lease, *_ in h.answers.values()}
        # In updates that do not wait, gradients are on their way at any time.
        moves = not self._ending and not self._runtime.max_staleness and bool(self._draining & self.server.nodes())
        # Workers hear of it with their next lease, which begins when it has the weights that are made of these.
        self._free(self._accepted_parts)
        self._accepted_parts.clear()
        result = self.server.commit(version, tasks, slots, read)
        if moves:
            self._move_server()
        return result

    def snapshot(self) -> dict[str, Any]:
        return self.server.snapshot()

    def restore(self, snapshot: dict[str, Any], error: ServerLostError) -> None:
        self._free([*self._answered.values(), *self._accepted_parts])
        self._answered.clear()
        self._accepted_parts.clear()
        while True:
            self._note("server", error.problem)
            try:
                self._place_server(snapshot)
                return
            except ServerLostError as again:
                error = again

    def _place_server(self, snapshot: dict[str, Any]) -> None:
        """Puts a server in the place of the one there is; leases that are out are answered for nothing.

        It has started when this returns: workers that wait for its weights would be taken to hang.
        """
        self.server.close()
        self._unwanted = {lease.number for h in self._handles.values() for lease, *_ in h.answers.values()}
        self._server = self._new_server(snapshot)
        self._server.wait()

    def _new_server(self, snapshot: dict[str, Any]) -> RayServer:
        return RayServer(snapshot, self._outer, self._runtime, self._transport, within_messages())

    def _move_server(self) -> None:
        """Away from nodes that are being drained, where nothing new is placed."""
        self._place_server(self.server.snapshot())
        self._moved.append(Moved("the parameter server", "its node is being drained"))

    @property
    def server(self) -> RayServer:
        assert self._server is not None, "start() comes first"
        return self._server

    def restarts(self) -> dict[str, int]:
        return dict(self._losses.counts)

    def describe(self) -> dict[str, Any]:
        device = "cuda" if self._gpus else "cpu"
        return {
            "type": "ray",
            "ray": ray.__version__,
            "workers": self._workers,
            "device": device,
            "gpus_per_worker": self._gpus,
            "server_shards": len(self._server.cuts) if self._server else self._runtime.server_shards,
        }

    def close(self) -> None:
        for handle in self._handles.values():
            handle.end()
        self._handles.clear()
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._started_here:
            ray.shutdown()

    # ----------------------------------------------------------------- workers

    def _hire(self) -> None:
        options = {
            "num_cpus": self._runtime.threads_per_worker,
            "num_gpus": self._gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            **self._transport.options,
        }
        device = "cuda" if self._gpus else "cpu"
        actor = self._kind.options(**options).remote(self._experiment_ref, device, self._make_worker, self._transport)
        self._handles[self._next_worker] = Handle(Line(actor), actor.ready.remote())
        self._next_worker += 1

    def _heard(self, number: int, handle: Handle, ref: ObjectRef, value: Any) -> list[Event]:
        try:
            value = ray.get(ref) if value is None else value
        except RayTaskError as e:
            cause = cause_of(e)
            if not isinstance(cause, RayError):
                raise cause from e
            lease, *_ = handle.answers.pop(ref, (None,))
            handle.line.by_ray()
            if lease is not None and lease.number in self._unwanted:
                return []
            # What workers are handed that can be lost is weights alone.
            raise server_is_gone(cause) from e
        except RayError as e:
            # An answer that is lost was on the worker's node, which is gone then.
            expected = handle.leaving or (isinstance(e, ActorDiedError) and e.preempted)
            return [self._replace(number, first_line(e), expected)]
        if ref == handle.starting:
            handle.starting, handle.node, handle.pid = None, value["node"], value["pid"]
            return [Joined(number)]
        lease, cuts, far = handle.answers.pop(ref)
        report, near = unpacked(value)
        if lease.round.kind == "train":
            sources = {True: iter(near), False: iter(far)}
            self._answered[lease.number] = handle, [next(sources[is_near]) for _, _, is_near in cuts]
        return [Computed(number, report)]

    def dismiss(self, worker: int, reason: str) -> Died:
        return self._replace(worker, reason)

    def _leave(self) -> list[Event]:
        """Lets go of the workers of nodes that are being drained, once they hold no lease; looks once a second.

        The server leaves with the next commit.

        If the driver's own node is one of them, the run is stopped as by SIGTERM: it can be resumed elsewhere. All stay
        where they are then, for the step that is the last.
        """
        now = time.monotonic()
        if now - self._membership_seen < _MEMBERSHIP_S:
            return []
        self._membership_seen = now
        self._draining = draining = draining_nodes()
        if self._here in draining:
            if not self._ending:
                self._ending = True
                signal.raise_signal(signal.SIGTERM)
            return []
        events, self._moved = self._moved, []
        for number, handle in list(self._handles.items()):
            handle.leaving = handle.leaving or handle.node in draining
            if handle.leaving and not handle.answers:
                self._end(number)
                self._hire()
                events.append(Left(number, "its node is being drained"))
        if self._grows:
            self._grow()
        return events

    def _grow(self) -> None:
        """Hires for the room that there is, when all who were hired have begun: the room may be theirs."""
        if any(handle.starting for handle in self._handles.values()):
            return
        for _ in range(room_for_workers(self._runtime.threads_per_worker, self._gpus, self._draining)):
            self._hire()
        self._workers = len(self._handles)

    def _replace(self, number: int, reason: str, expected: bool = False) -> Died:
        # The actor may still live if it was only out of reach, or hangs.
        self._end(number)
        self._note("worker", reason, expected)
        self._hire()
        return Died(number, reason)

    def _end(self, number: int) -> None:
        handle = self._handles.pop(number)
        handle.end()
        if self._server is not None and handle.pid:
            self._server.forget(handle.pid)

    def _note(self, kind: Kind, reason: str, expected: bool = False) -> None:
        """Counts a loss.

        Raises:
            ClusterError: there were too many.
        """
        action = self._losses.note(Loss(kind, time.monotonic(), reason, expected))
        if isinstance(action, GiveUp):
            raise ClusterError("runtime", action.problem, action.mend)
