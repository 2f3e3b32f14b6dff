"""Asking every node of a Ray cluster something, each within a time.

Nodes that are asked may have another metadist than the driver, or none: what is sent to them is sent by value and
needs no module of ours.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metadist.errors import first_line
from metadist.runtime.cluster import free_by_node


@ray.remote(num_cpus=0, max_restarts=0)
class _Probe:
    """A process on one node that answers."""

    def ask(self, question: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return question(*args)

    def give(self, size: int) -> Any:
        import numpy

        return numpy.ones(size, dtype=numpy.uint8)

    def take(self, given: list[Any]) -> float:
        """Seconds to fetch an object of another node."""
        start = time.perf_counter()
        ray.get(given[0])
        return time.perf_counter() - start

    def put_get(self, size: int) -> tuple[float, float]:
        """Seconds to put so many bytes and to get them; of three times the best, since the first touch is slow."""
        import numpy

        data, best = numpy.ones(size, dtype=numpy.uint8), (float("inf"), float("inf"))
        for _ in range(3):
            start = time.perf_counter()
            ref = ray.put(data)
            half = time.perf_counter()
            ray.get(ref).sum()
            best = min(best[0], half - start), min(best[1], time.perf_counter() - half)
            del ref
        return best


@dataclass(frozen=True)
class Node:
    """A living node.

    Args:
        name: its host's; with the beginning of its id where several nodes are on one.
        cpus, gpus: that Ray has there; free ones are not in use by anybody now.
        store: bytes of its object store.
        accelerators: their kind, as Ray calls it.
    """

    name: str
    cpus: float = 0.0
    gpus: float = 0.0
    free_cpus: float = 0.0
    free_gpus: float = 0.0
    store: int = 0
    accelerators: tuple[str, ...] = ()


@dataclass(frozen=True)
class NoAnswer:
    """Why a node did not answer."""

    reason: str
    silent: bool = False


class ClusterNodes:
    """The nodes of the cluster that this process is connected to.

    Args:
        deadline_s: seconds in which a node has to answer; one that does not is not asked again.
        by_value: modules whose functions are sent as they are.

    Attributes:
        nodes: by id.
        here: id of the driver's node.
    """

    def __init__(self, deadline_s: float, by_value: tuple[ModuleType, ...] = ()) -> None:
        for module in (sys.modules[__name__], *by_value):
            ray.cloudpickle.register_pickle_by_value(module)
        self._deadline_s = deadline_s
        self.nodes: dict[str, Node] = living_nodes()
        self.here = ray.get_runtime_context().get_node_id()
        self._probes: dict[str, Any] = {}
        actor: Any = _Probe
        for node in self.nodes:
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            self._probes[node] = actor.options(scheduling_strategy=strategy).remote()

    def ask(self, question: Callable[..., Any], *args: Any, only: str | None = None) -> dict[str, Any]:
        """Answers by node, :class:`NoAnswer` of one that failed."""
        asked = self._probes if only is None else {n: p for n, p in self._probes.items() if n == only}
        if only is not None and not asked:
            return {only: NoAnswer("is not there any more", silent=True)}
        return self._answers({n: p.ask.remote(question, args) for n, p in asked.items()})

    def store_rates(self, size: int) -> dict[str, Any]:
        """Seconds to put and to get so many bytes, by node; one node after another."""
        found: dict[str, Any] = {}
        for node in list(self._probes):
            found |= self._answers({node: self._probes[node].put_get.remote(size)})
        return found

    def transfers(self, size: int) -> dict[tuple[str, str], Any]:
        """Seconds from each node to the next, the last to the first; of two times the better."""
        order = list(self._probes)
        found: dict[tuple[str, str], Any] = {}
        for giver, taker in zip(order, order[1:] + order[:1]) if len(order) > 1 else ():
            for _ in range(2):
                if giver not in self._probes or taker not in self._probes:
                    break
                given = self._probes[giver].give.remote(size)
                answer = self._answers({taker: self._probes[taker].take.remote([given])})[taker]
                before = found.get((giver, taker), answer)
                found[giver, taker] = min(before, answer) if isinstance(answer, float) else answer
        return found

    def close(self) -> None:
        for probe in self._probes.values():
            ray.kill(probe)
        self._probes.clear()

    def _answers(self, refs: Mapping[str, Any]) -> dict[str, Any]:
        end, found = time.monotonic() + self._deadline_s, {}
        for node, ref in refs.items():
            try:
                found[node] = ray.get(ref, timeout=max(end - time.monotonic(), 0.01))
            except GetTimeoutError:
                found[node] = NoAnswer(f"has not answered in {self._deadline_s:g} s", silent=True)
                self._probes.pop(node)
            except RayTaskError as e:
                found[node] = NoAnswer(first_line(e.cause if e.cause is not None else e))
            except RayError as e:
                found[node] = NoAnswer(first_line(e), silent=True)
                self._probes.pop(node)
        return found


def living_nodes() -> dict[str, Node]:
    """The nodes that Ray takes to live, by id."""
    alive = [n for n in ray.nodes() if n["Alive"]]
    free, hosts = free_by_node(), [n["NodeManagerHostname"] for n in alive]
    found = {}
    for node in alive:
        key, host, all_of = node["NodeID"], node["NodeManagerHostname"], node["Resources"]
        left = free.get(key, {})
        found[key] = Node(
            host if hosts.count(host) == 1 else f"{host}/{key[:6]}",
            all_of.get("CPU", 0.0),
            all_of.get("GPU", 0.0),
            left.get("CPU", 0.0),
            left.get("GPU", 0.0),
            int(all_of.get("object_store_memory", 0)),
            tuple(r.partition(":")[2] for r in all_of if r.startswith("accelerator_type:")),
        )
    return found
