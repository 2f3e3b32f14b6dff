"""What a simulation is of: the work, how the run is arranged, and the machines with what their parts cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

INFINITE = math.inf
BYTES_A_NUMBER = 4


@dataclass(frozen=True)
class Compute:
    """How long workers take.

    Args:
        seconds: of a microbatch, the mean.
        variation: its coefficient of variation; the times are lognormal. 0: all take ``seconds``.
        slow_workers: how many workers, the first ones, are slower.
        slow_by: by which factor.
        on_cores: whether it takes a core of the worker's node; else a GPU, or a timed wait, that nobody shares.
        seed: of the draws.
    """

    seconds: float
    variation: float = 0.0
    slow_workers: int = 0
    slow_by: float = 1.0
    on_cores: bool = False
    seed: int = 0

    def draw(self, version: int, start: int, stop: int, worker: int) -> float:
        """Seconds that ``worker`` takes for microbatches ``[start, stop)`` of ``version``: the same whenever asked."""
        each = self.seconds * (self.slow_by if worker < self.slow_workers else 1.0)
        if not self.variation:
            return each * (stop - start)
        key = np.array([self.seed, worker], dtype=np.uint64)
        bits = np.random.Philox(key=key, counter=np.array([0, 0, start, version], dtype=np.uint64))
        spread = math.log1p(self.variation**2)
        normal = np.random.Generator(bits).standard_normal(stop - start)
        return float(each * np.exp(math.sqrt(spread) * normal - spread / 2).sum())


@dataclass(frozen=True)
class Deaths:
    """How workers end.

    Args:
        per_hour: deaths of one worker in an hour, at random times.
        replacement_s: seconds until another is ready in its place.
        seed: of the draws.
    """

    per_hour: float = 0.0
    replacement_s: float = 10.0
    seed: int = 0

    def after(self, worker: int) -> float:
        """Seconds that a worker lives."""
        if not self.per_hour:
            return INFINITE
        bits = np.random.Philox(key=np.array([self.seed, worker], dtype=np.uint64))
        return float(np.random.Generator(bits).standard_exponential() * 3600 / self.per_hour)


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Args:
        workers: how many there are.
        model_bytes: of the meta-parameters, in float32.
        compute: of a microbatch.
        microbatches: of an update; None: one a worker.
        deaths: of workers.
    """

    workers: int
    model_bytes: float
    compute: Compute
    microbatches: int | None = None
    deaths: Deaths = Deaths()

    @property
    def count(self) -> int:
        """Microbatches of an update."""
        return self.microbatches or self.workers


Topology = Literal["server", "allreduce", "allreduce_unordered"]


@dataclass(frozen=True)
class Arrangement:
    """What one can choose; names and meanings are those of the config's ``runtime`` section.

    Args:
        topology, server_shards, node_sums, quorum, max_staleness: as there.
        wire_bytes: of a number of a gradient that travels to a server: 4, or 2 for bfloat16.
        duplicates: whether work is dealt by measured speed and late work is leased twice, as the controller does; else
            shares are equal and everybody is waited for.
    """

    topology: Topology = "server"
    server_shards: int = 1
    node_sums: bool = False
    wire_bytes: int = BYTES_A_NUMBER
    quorum: float = 1.0
    max_staleness: int = 0
    duplicates: bool = True


@dataclass(frozen=True)
class Costs:
    """CPU seconds of what is sent and heard, of a cluster at rest.

    Args:
        lease_s: the driver's, to send a lease.
        answer_s: the driver's, to hear an answer and send its gradients on.
        part_s: the driver's, for each further shard that an answer has a part for.
        step_s: the driver's, once an update.
        worker_s: of a worker and of what serves it on its node, for a lease: half before computing, half after.
        crowd_s: more of a worker's, for each other worker on its node: the more processes take turns on the cores, the
            colder each finds the caches.
        worker_part_s: more of a worker's, for each further shard that it has a part for.
        add_s: of a server's shard, to take a gradient.
        commit_s: of a server's shard, or of a member of an all-reduce, to be asked for an update and answer.
        message_s: of a member of an all-reduce, for a message to another.
    """

    lease_s: float = 0.0
    answer_s: float = 0.0
    part_s: float = 0.0
    step_s: float = 0.0
    worker_s: float = 0.0
    crowd_s: float = 0.0
    worker_part_s: float = 0.0
    add_s: float = 0.0
    commit_s: float = 0.0
    message_s: float = 0.0


@dataclass(frozen=True)
class Machine:
    """One node.

    Args:
        cores: shared evenly by the processes that are awake.
        copy_bytes_per_s: of a thread that copies, as into or out of the object store.
        sum_bytes_per_s: of a thread that sums gradients, in bytes read and written.
        updates_per_s: numbers a second that a thread moves by the optimizer.
        threads: copies, sums and updates that run side by side at full speed, before the memory's bandwidth ends.
        tcp_bytes_per_s: that a core sends or receives, in an all-reduce.
    """

    cores: float = INFINITE
    copy_bytes_per_s: float = INFINITE
    sum_bytes_per_s: float = INFINITE
    updates_per_s: float = INFINITE
    threads: float = INFINITE
    tcp_bytes_per_s: float = INFINITE


@dataclass(frozen=True)
class Network:
    """Between nodes.

    Args:
        bytes_per_s: of a node's link, in each direction.
        latency_s: of a message, one way.
    """

    bytes_per_s: float = INFINITE
    latency_s: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Equal nodes; the driver is on the first.

    Args:
        machine: each node.
        network: between them.
        costs: of messages.
        workers_per_node: workers of a node; None: all on one.
        source: where the numbers are from, in words.
    """

    machine: Machine = Machine()
    network: Network = Network()
    costs: Costs = Costs()
    workers_per_node: int | None = None
    source: str = ""

    def nodes(self, workers: int) -> int:
        """How many nodes so many workers are on."""
        return -(-workers // (self.workers_per_node or workers))


PARTS = ("stragglers", "driver", "cores", "network", "object store", "sum", "update")
"""What a step takes longer for than computing, in the order in which :func:`without` is applied."""


def without(part: str, work: Work, cluster: Cluster) -> tuple[Work, Cluster]:
    """The same, if one of :data:`PARTS` cost nothing."""
    machine, costs = cluster.machine, cluster.costs
    if part == "stragglers":
        return replace(work, compute=replace(work.compute, variation=0.0, slow_workers=0), deaths=Deaths()), cluster
    if part == "driver":
        costs = replace(costs, lease_s=0.0, answer_s=0.0, part_s=0.0, step_s=0.0)
    elif part == "cores":
        costs = replace(costs, worker_s=0.0, crowd_s=0.0, worker_part_s=0.0, add_s=0.0, commit_s=0.0, message_s=0.0)
        machine = replace(machine, tcp_bytes_per_s=INFINITE)
    elif part == "network":
        return work, replace(cluster, network=Network())
    elif part == "object store":
        machine = replace(machine, copy_bytes_per_s=INFINITE)
    elif part == "sum":
        machine = replace(machine, sum_bytes_per_s=INFINITE)
    elif part == "update":
        machine = replace(machine, updates_per_s=INFINITE)
    else:
        raise ValueError(f"there is no part {part!r} of a step; there are {', '.join(PARTS)}")
    return work, replace(cluster, machine=machine, costs=costs)
