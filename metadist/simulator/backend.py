"""Workers and a parameter server that are modelled, for the controller to drive on a virtual clock."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from metadist.errors import ServerLostError
from metadist.rounds import Lease, Report, sums_of
from metadist.runtime.backend import WITHIN_MESSAGES, Computed, Died, Event, Joined
from metadist.simulator.cluster import BYTES_A_NUMBER, Arrangement, Cluster, Work
from metadist.simulator.events import Events, Link, Process, Shared, Then

HOLD_BYTES = float(1 << 31)
"""Gradients that a shard lets wait before it adds them up (:class:`metadist.outer.gradient.TreeSum`)."""


class Node:
    """A machine: its cores, its memory, its link, the process that sums for it, and the weights that came to it."""

    def __init__(self, events: Events, cluster: Cluster) -> None:
        self.cores = Shared(events, cluster.machine.cores)
        self.memory = Shared(events, cluster.machine.threads)
        self.link = Link(events, cluster.network.bytes_per_s)
        self.sums = Process(self.cores, self.memory)
        self.gathered: set[int] = set()
        self.workers = 0
        self.busy = 0
        self.version = -1
        self.coming = 0
        self.waiting: list[Then] = []


class Worker:
    """A worker: its node, the lease it holds, whether it lives."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.lease: Lease | None = None
        self.lives = True


class Shard:
    """A part of the server: its process, its node, and the bytes of gradients that wait to be added up.

    It has ``unread_s`` to do before it has opened those that lie on its node.
    """

    def __init__(self, node: Node) -> None:
        self.node, self.process = node, Process(node.cores, node.memory)
        self.held, self.unread_s = 0.0, 0.0


class SimulatedBackend:
    """A :class:`metadist.runtime.backend.Backend` whose workers and server take time and nothing else.

    Weights come to each node once; gradients go to every shard as they are accepted, in as many partial sums as the
    tree leaves of a lease; a shard adds them up when the update is made, or before where they are too many to hold.

    Args:
        work, arrangement, cluster: what is simulated.
    """

    def __init__(self, work: Work, arrangement: Arrangement, cluster: Cluster) -> None:
        self.work, self.arrangement, self.cluster = work, arrangement, cluster
        self.costs, self.machine = cluster.costs, cluster.machine
        self.events = Events()
        self.nodes = [Node(self.events, cluster) for _ in range(cluster.nodes(work.workers))]
        self.shards = [Shard(self.nodes[s % len(self.nodes)]) for s in range(arrangement.server_shards)]
        self.version, self.deaths = 0, 0
        self._workers: dict[int, Worker] = {}
        self._idle: list[int] = []
        self._next_worker = 0
        self._news: list[Event] = []
        self._answered: dict[int, Worker] = {}
        self._count = 0
        self._on_their_way = 0
        for i in range(work.workers):
            self._join(self.nodes[i // (cluster.workers_per_node or work.workers)])

    def clock(self) -> float:
        """The time, in seconds."""
        return self.events.now

    # ----------------------------------------------------------------- what a controller calls

    def start(self, snapshot: dict[str, Any], outer: dict[str, Any]) -> None:
        """Nothing: everybody is there from the beginning."""

    def idle(self) -> list[int]:
        return list(self._idle)

    def workers(self) -> list[int]:
        return list(self._workers)

    def lease(self, worker: int, lease: Lease) -> None:
        self._think(self.costs.lease_s)
        self._idle.remove(worker)
        found = self._workers[worker]
        found.lease = lease
        found.node.busy += 1
        self._later(found.node, partial(self._received, worker, found, lease, self.version))

    def wait(self, timeout: float) -> list[Event]:
        self.events.run(lambda: bool(self._news), self.events.now + timeout)
        news, self._news = self._news, []
        heard: list[Event] = []
        for event in news:
            if isinstance(event, Computed):
                self._think(self.costs.answer_s)
                heard += self._heard(event)
            elif not isinstance(event, Died) or event.worker in self._workers:
                if isinstance(event, Died):
                    self._remove(event.worker)
                heard.append(event)
        return heard

    def dismiss(self, worker: int, reason: str) -> Died:
        self._workers[worker].lives = False
        self._remove(worker)
        return Died(worker, reason)

    def accept(self, lease: Lease, version: int, count: int, slot: int | None = None, weight: float = 1.0) -> None:
        self._think(self.costs.part_s * (len(self.shards) - 1))
        node = self._answered.pop(lease.number).node
        numbers = range(lease.start, lease.stop) if slot is None else [slot]
        self._count = count
        if not self.arrangement.node_sums:
            self._send(node, sums_of(numbers, count))
            return
        node.gathered |= set(numbers)
        self._on_their_way += 1
        node.sums.submit(self.costs.add_s, 0.0, self._arrived)
        if not node.busy:
            self._pass_on(node)

    def drop(self, lease: Lease) -> None:
        self._answered.pop(lease.number, None)

    def settle(self) -> list[Lease]:
        for node in self.nodes:
            self._pass_on(node)
        if self._gradient_bytes > WITHIN_MESSAGES:  # what goes within them cannot be lost
            self.events.run(lambda: not self._on_their_way)
        return []

    def commit(
        self,
        version: int,
        tasks: float,
        slots: Sequence[int] | None = None,
    ) -> dict[str, float]:
        self._think(self.costs.step_s)
        size = self.work.model_bytes / len(self.shards)
        update = size / BYTES_A_NUMBER / self.machine.updates_per_s
        if any(node is not shard.node for node in self.nodes for shard in self.shards):
            update += size / self.machine.copy_bytes_per_s  # an object for other nodes
        sums = [self._sum_s(shard.held, size) for shard in self.shards]
        if len(self.shards) > 1:
            self._ask_all(sums)
            sums = [0.0 for _ in sums]
        self.version += 1
        for shard in self.shards:
            shard.held = 0.0
        self._ask_all([took + update for took in sums])
        return {}

    def restore(self, snapshot: dict[str, Any], error: ServerLostError) -> None:
        raise AssertionError("a simulated server is never lost")

    def snapshot(self) -> dict[str, Any]:
        return {"version": self.version}

    def restarts(self) -> dict[str, int]:
        return {"worker": self.deaths, "server": 0}

    def describe(self) -> dict[str, Any]:
        return {"type": "simulated", "workers": self.work.workers, "device": "none"}

    def close(self) -> None:
        """Nothing."""

    # ----------------------------------------------------------------- the driver

    def _think(self, seconds: float) -> None:
        """The driver, which does one thing after another, takes a core for so long; the others go on meanwhile."""
        if seconds > 0.0:
            done: list[bool] = []
            self.nodes[0].cores.submit(seconds, lambda: done.append(True))
            self.events.run(lambda: bool(done))

    def _later(self, node: Node, then: Then) -> None:
        """A message between the driver and a node, either way."""
        away = node is not self.nodes[0]
        self.events.at(self.events.now + (self.cluster.network.latency_s if away else 0.0), then)

    def _ask_all(self, seconds: Sequence[float]) -> None:
        """Asks each shard for something that takes its memory so many seconds, and waits for them all."""
        answers: list[bool] = []

        def finished(shard: Shard) -> None:
            self._later(shard.node, lambda: answers.append(True))

        for shard, memory_s in zip(self.shards, seconds, strict=True):
            cpu_s, shard.unread_s = self.costs.commit_s + shard.unread_s, 0.0
            self._later(shard.node, partial(shard.process.submit, cpu_s, memory_s, partial(finished, shard)))
        self.events.run(lambda: len(answers) == len(seconds))

    # ----------------------------------------------------------------- workers

    def _join(self, node: Node) -> int:
        number, self._next_worker = self._next_worker, self._next_worker + 1
        worker = self._workers[number] = Worker(node)
        node.workers += 1
        bisect.insort(self._idle, number)
        lives = self.work.deaths.after(number)
        if lives < float("inf"):
            self.events.at(self.events.now + lives, partial(self._die, number, worker))
        return number

    def _die(self, number: int, worker: Worker) -> None:
        worker.lives = False
        if worker.lease is not None:
            self._news.append(Died(number, "killed"))

    def _remove(self, number: int) -> None:
        """A worker is gone; a replacement comes some time later."""
        worker = self._workers.pop(number)
        worker.node.workers -= 1
        if worker.lease is not None:
            worker.node.busy -= 1
        elif number in self._idle:
            self._idle.remove(number)
        self.deaths += 1

        def replaced() -> None:
            self._news.append(Joined(self._join(worker.node)))

        self.events.at(self.events.now + self.work.deaths.replacement_s, replaced)

    def _received(self, number: int, worker: Worker, lease: Lease, version: int) -> None:
        if not worker.lives:  # it had died with nothing to do, which is seen when it is asked
            self._news.append(Died(number, "killed"))
            return
        if all(shard.node is worker.node for shard in self.shards):
            self._awake(number, worker, lease, version)
            return
        # Weights go to other nodes as objects: the lease is not sent before they are there.
        self._with_weights(worker.node, version, partial(self._awake, number, worker, lease, version))

    def _with_weights(self, node: Node, version: int, then: Then) -> None:
        """Goes on once the weights of ``version`` are on a node, which fetches them once from every shard."""
        if version > node.version:
            node.version, node.waiting = version, []
            away = [shard for shard in self.shards if shard.node is not node]
            node.coming = len(away)
            size = self.work.model_bytes / len(self.shards)
            for shard in away:
                came = partial(self._came, node, version)
                shard.node.link.send(node.link, size, self.cluster.network.latency_s, came)
        if version == node.version and node.coming:
            node.waiting.append(then)
        else:
            then()

    def _came(self, node: Node, version: int) -> None:
        if version == node.version:
            node.coming -= 1
            if not node.coming:
                waiting, node.waiting = node.waiting, []
                for then in waiting:
                    then()

    def _awake(self, number: int, worker: Worker, lease: Lease, version: int) -> None:
        """It reads the weights, where they lie or as a copy, computes, writes what it found, and answers."""
        compute = self.work.compute
        seconds = compute.draw(lease.round.version, lease.start, lease.stop, number)
        copy = self.machine.copy_bytes_per_s
        given = sums_of(range(lease.start, lease.stop), lease.round.microbatches)
        node = worker.node
        in_place = len(self.shards) == 1 and self.shards[0].node is node
        read, write = 0.0 if in_place else self.work.model_bytes / copy, given * self._gradient_bytes / copy
        more_s = self.costs.crowd_s * (node.workers - 1) + self.costs.worker_part_s * max(0, len(self.shards) - 1)
        awake_s = (self.costs.worker_s + more_s) / 2

        def computes() -> None:
            if compute.on_cores:
                node.cores.submit(seconds, computed)
            else:
                self.events.at(self.events.now + seconds, computed)

        def computed() -> None:
            self._in_turn(node, awake_s, write, lambda: self._later(node, answer))

        def answer() -> None:
            if worker.lives:
                tasks = sum(len(lease.round.episodes(m)) for m in range(lease.start, lease.stop))
                self._news.append(Computed(number, Report(lease, {"loss": np.zeros(tasks)}, seconds, 0.0)))

        self._in_turn(node, awake_s, read, computes)

    @staticmethod
    def _in_turn(node: Node, cpu_s: float, memory_s: float, then: Then) -> None:
        node.cores.submit(cpu_s, lambda: node.memory.submit(memory_s, then))

    def _heard(self, event: Computed) -> list[Event]:
        worker = self._workers.get(event.worker)
        if worker is None:
            return []  # it died, or was dismissed, while its answer was being heard
        worker.lease = None
        worker.node.busy -= 1
        bisect.insort(self._idle, event.worker)
        self._answered[event.report.lease.number] = worker
        return [event]

    # ----------------------------------------------------------------- gradients

    @property
    def _gradient_bytes(self) -> float:
        return self.work.model_bytes * self.arrangement.wire_bytes / BYTES_A_NUMBER

    def _sum_s(self, held: float, written: float) -> float:
        """Seconds in which a shard adds up ``held`` bytes; a single gradient is copied at best."""
        return (held + written) / self.machine.sum_bytes_per_s if held else 0.0

    def _send(self, node: Node, sums: int) -> None:
        """Sends every shard its part of so many partial sums that are on ``node``."""
        size = sums * self._gradient_bytes / len(self.shards)
        for shard in self.shards:
            if shard.node is node and not self.arrangement.node_sums:
                # It lies where the shard reads it; where, is told with the update.
                shard.held += size
                shard.unread_s += self.costs.add_s
                continue
            self._on_their_way += 1
            take = partial(self._taken, shard, size)
            if shard.node is node:
                self.events.at(self.events.now, take)
            else:
                node.link.send(shard.node.link, size, self.cluster.network.latency_s, take)

    def _taken(self, shard: Shard, size: float) -> None:
        shard.held += size
        adding = 0.0
        if shard.held > HOLD_BYTES:
            one = self.work.model_bytes / len(self.shards)
            adding, shard.held = self._sum_s(shard.held, one), one
        shard.process.submit(self.costs.add_s, adding, self._arrived)

    def _arrived(self) -> None:
        self._on_their_way -= 1

    def _pass_on(self, node: Node) -> None:
        """What a node has summed goes to the server."""
        if not node.gathered:
            return
        gathered, node.gathered = node.gathered, set()
        left = sums_of(gathered, self._count)
        read = (len(gathered) + left) * self._gradient_bytes
        memory_s = read / self.machine.sum_bytes_per_s + left * self._gradient_bytes / self.machine.copy_bytes_per_s
        self._on_their_way += 1

        def summed() -> None:
            self._send(node, left)
            self._on_their_way -= 1

        node.sums.submit(self.costs.add_s, memory_s, summed)
