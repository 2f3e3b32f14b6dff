"""Workers that hold the server between them and exchange by all-reduce, modelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from metadist.rounds import Lease, sums_of
from metadist.simulator.backend import Node, SimulatedBackend
from metadist.simulator.cluster import BYTES_A_NUMBER, Arrangement, Cluster, Work
from metadist.simulator.events import Then


class SimulatedAllReduce(SimulatedBackend):
    """The same without a server: the workers exchange partial sums, add up a part each, and gather the weights.

    As :class:`metadist.allreduce.Member` does, in order or not. What the members of a node send to one another takes
    its cores alone, the rest its link as well.
    """

    def __init__(self, work: Work, arrangement: Arrangement, cluster: Cluster) -> None:
        super().__init__(work, arrangement, cluster)
        self.shards = []
        self._sums = [0] * work.workers

    def accept(self, lease: Lease, version: int, count: int, slot: int | None = None, weight: float = 1.0) -> None:
        worker = self._answered.pop(lease.number)
        rank = next(n for n, w in self._workers.items() if w is worker)
        self._sums[rank] += sums_of(range(lease.start, lease.stop), count)

    def settle(self) -> list[Lease]:
        return []

    def commit(
        self,
        version: int,
        tasks: float,
        slots: Sequence[int] | None = None,
    ) -> dict[str, float]:
        self._think(self.costs.part_s * self.work.workers)
        self._everybody(lambda rank: self.costs.commit_s, lambda rank: 0.0)
        if self.arrangement.topology == "allreduce":
            self._ordered()
        else:
            self._plain()
        self._think(self.costs.step_s)
        self._sums = [0] * self.work.workers
        self.version += 1
        return {}

    def _with_weights(self, node: Node, version: int, then: Then) -> None:
        then()

    def _ordered(self) -> None:
        ranks, size = self.work.workers, self.work.model_bytes
        part, others = size / ranks, (ranks - 1) / ranks
        sums = max(1, sum(self._sums))
        sent, received = [own * size * others for own in self._sums], sums * part * others
        self._exchange(sent, received, self._across(sent, received), ranks - 1, 1)
        self._everybody(lambda rank: 0.0, lambda rank: self._sum_s(sums * part, part))
        self._exchange([0.0] * ranks, 0.0, 0.0, 2 * (ranks - 1), ranks - 1)  # the norm, a few numbers from each
        self._everybody(lambda rank: 0.0, lambda rank: part / BYTES_A_NUMBER / self.machine.updates_per_s)
        self._ring(size * others, ranks - 1)

    def _plain(self) -> None:
        ranks, size = self.work.workers, self.work.model_bytes
        others, rate = (ranks - 1) / ranks, self.machine.sum_bytes_per_s
        self._everybody(lambda rank: 0.0, lambda rank: max(0, self._sums[rank] - 1) * 3 * size / rate)
        self._ring(2 * size * others, 2 * (ranks - 1))
        update = size / BYTES_A_NUMBER / self.machine.updates_per_s
        self._everybody(lambda rank: 0.0, lambda rank: others * 3 * size / rate + update)

    def _ring(self, size: float, steps: int) -> None:
        """Each sends ``size`` bytes to the next, in so many steps: of a node, one rank's go through the link."""
        self._exchange([size] * self.work.workers, size, size, steps, steps)

    def _exchange(
        self, sent: Sequence[float], received: float, through_link: float, messages: int, after_another: int
    ) -> None:
        """An exchange in which all take part.

        Args:
            sent: bytes that each rank sends.
            received: bytes that each receives.
            through_link: bytes that the busiest node sends or receives through its link, if there are several.
            messages: that each sends.
            after_another: how many of them wait for one another.
        """
        tcp, network, ends = self.machine.tcp_bytes_per_s, self.cluster.network, self.events.now
        if len(self.nodes) > 1:
            ends += through_link / network.bytes_per_s + after_another * network.latency_s
        cpu_s = [messages * self.costs.message_s + (own + received) / tcp for own in sent]
        self._everybody(lambda rank: cpu_s[rank], lambda rank: 0.0)
        self.events.run(lambda: False, max(ends, self.events.now))

    def _across(self, sent: Sequence[float], received: float) -> float:
        """Bytes that go out of, or come in to, the busiest node, when each sends to each."""
        ranks = self.work.workers
        there, others = self.cluster.workers_per_node or ranks, max(1, ranks - 1)
        out = [sum(sent[a : a + there]) * (ranks - min(there, ranks - a)) / others for a in range(0, ranks, there)]
        return max(*out, there * received * (ranks - there) / others)

    def _everybody(self, cpu_s: Callable[[int], float], memory_s: Callable[[int], float]) -> None:
        """Something that every rank does by itself; all are waited for."""
        done: list[bool] = []
        for rank, worker in enumerate(self._workers.values()):
            self._in_turn(worker.node, cpu_s(rank), memory_s(rank), lambda: done.append(True))
        self.events.run(lambda: len(done) == len(self._workers))
