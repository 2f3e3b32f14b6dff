"""A cluster of several nodes on this machine, and updates made on it while nodes and workers come and go.

A process of its own (``python -m tests.ray.several_nodes NAME [SEED ...]``), as it joins another cluster than the
other tests; prints what happened as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
import torch

from metadist.config import validate
from metadist.experiment import Experiment
from metadist.outer.gradient import Block, TreeSum, partial_sums
from metadist.runtime.controller import Controller
from metadist.server import ParameterServer
from metadist.worker import Lease, Report, Round

MICROBATCHES = 9
SIZES = [60_000, 1_000, 39_000]
NUMEL = sum(SIZES)  # 400 kB: too large to travel within a message


def gradient(version: int, microbatch: int, weights: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng([version, microbatch])
    made = rng.standard_normal(NUMEL).astype(np.float32) * np.float32(10.0 ** rng.integers(-3, 4))
    return made + weights * np.float32(0.1)


class Worker:
    """Gradients that depend on the version, on the microbatch and on the weights."""

    def __init__(self, experiment: Experiment, device: str) -> None:
        torch.set_num_threads(1)

    def compute(
        self, lease: Lease, weights: Sequence[np.ndarray], room: Any = None
    ) -> tuple[Report, dict[Block, np.ndarray]]:
        flat = np.concatenate(weights)
        time.sleep(0.01 * (lease.stop - lease.start))
        values = (gradient(lease.round.version, m, flat) for m in range(lease.start, lease.stop))
        blocks = partial_sums(lease.start, values, lease.round.microbatches)
        return Report(lease, {"loss": np.zeros(lease.stop - lease.start)}, 0.0, 0.0), blocks


def settings(**runtime: Any) -> tuple[Experiment, dict[str, Any], dict[str, Any]]:
    """An experiment, the options of its meta-update and the state it starts from."""
    config = validate({
        "tasks": {"type": "sinusoid"}, "model": {"type": "mlp"}, "algorithm": {"type": "maml"},
        "outer": {"lr": 1e-2, "clip_norm": 1.0, "steps": 1000, "meta_batch_size": MICROBATCHES,
                  "tasks_per_microbatch": 1},
        "runtime": {"gpus_per_worker": 0, **runtime},
    }, "the test")  # fmt: skip
    outer = {**config.outer.model_dump(), "sizes": SIZES, "rules": []}
    return Experiment(config), outer, {"version": 0, "weights": np.zeros(NUMEL, np.float32), "outer_state": {}}


def undisturbed(steps: int) -> list[str]:
    """Digests of the weights after each update, by one process that holds everything."""
    _, outer, snapshot = settings()
    server, told = ParameterServer.at(snapshot, outer), []
    for version in range(steps):
        tree, weights = TreeSum(MICROBATCHES), server.weights()
        for m in range(MICROBATCHES):
            tree.add(Block(0, m), gradient(version, m, weights))
        server.add(version, MICROBATCHES, tree.held())
        told.append(digest(server.commit(version, MICROBATCHES)[0]))
    return told


def digest(weights: np.ndarray) -> str:
    return hashlib.sha256(np.asarray(weights).tobytes()).hexdigest()


class Updates:
    """Meta-updates on a cluster, one at a time."""

    def __init__(self, address: str, **runtime: Any) -> None:
        from metadist.runtime.ray import RayBackend
        from metadist.runtime.ray_allreduce import AllReduceBackend

        experiment, outer, snapshot = settings(address=address, **runtime)
        kind = AllReduceBackend if runtime.get("topology") == "allreduce" else RayBackend
        self.backend, self.version = kind(experiment, Worker), 0
        self.told: list[str] = []
        self.events: list[str] = []
        self.backend.start(snapshot, outer)
        self.controller = Controller(self.backend, on_event=self.events.append)

    def step(self, meanwhile: Callable[[], Any] = lambda: None, times: int = 1) -> None:
        """``meanwhile`` happens when leases are out."""
        for _ in range(times):
            self.controller.begin(
                Round("train", self.version, "train", "train", self.version * MICROBATCHES, MICROBATCHES, 1)
            )
            meanwhile()
            self.controller.finish()
            self.backend.commit(self.version, MICROBATCHES)
            self.version += 1
            self.told.append(digest(self.backend.snapshot()["weights"]))

    def until(self, wanted: Callable[[], bool], what: str) -> None:
        """Hears of events until something is so."""
        deadline = time.monotonic() + 60
        while not wanted():
            assert time.monotonic() < deadline, f"{what} did not happen; heard: {self.events}"
            for event in self.backend.wait(0.2):
                self.controller._heard(event)

    def until_workers(self, number: int) -> None:
        self.until(lambda: len(self.backend.workers()) == number, f"{number} workers")

    def nodes(self) -> list[str]:
        return [h.node for h in self.backend._handles.values() if h.starting is None]


@contextlib.contextmanager
def cluster(head_cpus: int = 0) -> Iterator[Any]:
    """A head, by default without room for workers; nodes are added to it."""
    from ray.cluster_utils import Cluster

    soon = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3,
            "health_check_initial_delay_ms": 1000}  # fmt: skip
    head = {"num_cpus": head_cpus, "include_dashboard": False, "_system_config": soon}
    made = Cluster(initialize_head=True, connect=False, head_node_args=head)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def drain(cluster: Any, node: str) -> None:
    """Tells the cluster that a node will be gone, as an autoscaler or a preemption notice does."""
    in_an_hour = int((time.time() + 3600) * 1000)
    preemption = 2
    accepted, why = ray._raylet.GcsClient(address=cluster.address).drain_node(node, preemption, "a test", in_an_hour)
    assert accepted, why


# --------------------------------------------------------------------------- what happens


def come_and_go() -> dict[str, Any]:
    """Sums on nodes, two shards; a node joins, one is drained, a worker is killed, a node is killed."""
    with cluster() as nodes:
        first = nodes.add_node(num_cpus=2)
        updates = Updates(nodes.address, workers={"min": 2, "max": 4}, server_shards=2, node_sums=True)
        workers = [len(updates.backend.workers())]
        updates.step(times=2)
        second = nodes.add_node(num_cpus=2)
        updates.until_workers(4)
        updates.step(times=2)
        workers.append(len(updates.backend.workers()))
        drain(nodes, first.node_id)
        updates.until_workers(2)
        after_draining, restarts = updates.nodes(), updates.backend.restarts()
        updates.step(times=2)
        third = nodes.add_node(num_cpus=2)
        updates.until_workers(4)
        on_third = [n for n, h in updates.backend._handles.items() if h.node == third.node_id]
        updates.step(meanwhile=lambda: kill_worker(updates, on_third[0]))
        on_second = {n for n, h in updates.backend._handles.items() if h.node == second.node_id}
        updates.step(meanwhile=lambda: nodes.remove_node(second, allow_graceful=False))
        updates.until(lambda: not on_second & set(updates.backend.workers()), "the loss of a node")
        updates.step(times=2)
        result = {
            "told": updates.told, "undisturbed": undisturbed(updates.version), "events": updates.events,
            "workers": workers, "restarts_by_draining": restarts["worker"], "killed": on_third[:1],
            "all_on_second": {*after_draining} == {second.node_id}, "lost": sorted(on_second),
        }  # fmt: skip
        updates.backend.close()
        ray.init(address=nodes.address, logging_level="ERROR")
        result["asked_for_after_the_end"] = pending_actors()
    return result


def grows() -> dict[str, Any]:
    """``workers: auto`` on a cluster that grows by two nodes and loses one."""
    with cluster() as nodes:
        first = nodes.add_node(num_cpus=4)
        updates = Updates(nodes.address, workers="auto", threads_per_worker=2)
        workers = []

        def see(number: int) -> None:
            updates.until_workers(number)
            updates.step(times=2)
            workers.append(len(updates.backend.workers()))

        see(2)
        nodes.add_node(num_cpus=3)
        see(3)
        nodes.add_node(num_cpus=1)  # with what is left of the node before it would be room for one
        drain(nodes, first.node_id)
        see(1)
        nodes.add_node(num_cpus=8)
        see(5)
        result = {
            "told": updates.told, "undisturbed": undisturbed(updates.version), "workers": workers,
            "asked_for": len(updates.backend._handles), "restarts": updates.backend.restarts()["worker"],
        }  # fmt: skip
        updates.backend.close()
    return result


def kill_worker(updates: Updates, worker: int) -> None:
    # Whoever was killed a step ago may not have been missed yet.
    with contextlib.suppress(ProcessLookupError):
        os.kill(updates.backend._handles[worker].pid, signal.SIGKILL)


def pending_actors() -> int:
    """Actors that wait for room, which is what an autoscaler makes nodes for."""
    from ray._private.state import state

    names = (actor["State"] for actor in state.actor_table(None).values())
    return sum(name in ("PENDING_CREATION", "DEPENDENCIES_UNREADY") for name in names)


def server_moves() -> dict[str, Any]:
    """A node that holds a part of the server is drained, and then gone."""
    with cluster() as nodes:
        there = [nodes.add_node(num_cpus=2) for _ in range(2)]
        updates = Updates(nodes.address, workers=2, server_shards=3)
        updates.step(times=2)
        before = updates.backend.server.nodes()
        goes = next(node for node in there if node.node_id in before)
        drain(nodes, goes.node_id)
        updates.until(lambda: goes.node_id in updates.backend._draining, "the notice")
        updates.step(times=2)
        after = updates.backend.server.nodes()
        updates.until(lambda: any("moved" in event for event in updates.events), "the move is told")
        nodes.remove_node(goes, allow_graceful=False)
        updates.step(times=2)
        result = {
            "told": updates.told, "undisturbed": undisturbed(updates.version), "events": updates.events,
            "was_there": goes.node_id in before, "is_there": goes.node_id in after,
            "losses": updates.backend.restarts()["server"],
        }  # fmt: skip
        updates.backend.close()
    return result


def lost_on_the_way() -> dict[str, Any]:
    """A node dies when its workers have answered, before the server has what they computed."""
    found: dict[str, Any] = {}
    with cluster() as nodes:
        for node_sums in (False, True):
            node = nodes.add_node(num_cpus=1)
            updates = Updates(nodes.address, workers={"min": 1, "max": 2}, server_shards=2, node_sums=node_sums)
            updates.step()
            accept = updates.backend.accept

            def late(
                lease: Lease, *rest: Any, node: Any = node, accept: Any = accept, updates: Updates = updates
            ) -> None:
                updates.backend.accept = accept  # type: ignore[method-assign]
                nodes.remove_node(node, allow_graceful=False)
                accept(lease, *rest)
                nodes.add_node(num_cpus=1)

            updates.backend.accept = late  # type: ignore[method-assign]
            updates.step(times=2)
            found[f"node_sums={node_sums}"] = {
                "told": updates.told, "undisturbed": undisturbed(updates.version), "events": updates.events,
            }  # fmt: skip
            updates.backend.close()
            for left in list(nodes.worker_nodes):
                nodes.remove_node(left)
    return found


WORKERS, SHARDS = (1, 2, 3, 5), (1, 2, 4)


def grid(which: Sequence[int]) -> dict[str, Any]:
    """Every number of workers with every number of shards, with sums on nodes and without, and ordered all-reduce.

    In each but the latter a worker is killed, another joins, and all late leases are given out twice.

    Args:
        which: places in the grid.
    """
    places: list[dict[str, Any]] = [
        {"workers": w, "server_shards": s, "node_sums": n} for w in WORKERS for s in SHARDS for n in (False, True)
    ]
    places += [{"workers": w, "topology": "allreduce"} for w in WORKERS]
    told: dict[str, Any] = {"undisturbed": undisturbed(5), "places": []}
    with cluster() as nodes:
        for _ in range(2):
            nodes.add_node(num_cpus=3)
        for place in [places[i] for i in which] or places:
            updates, fixed = Updates(nodes.address, **place), "topology" in place
            updates.until_workers(place["workers"])
            updates.step()
            someone = updates.backend.workers()[0]
            updates.step(meanwhile=(lambda: None) if fixed else functools.partial(kill_worker, updates, someone))
            updates.until_workers(place["workers"])
            updates.step()
            updates.controller._patience = lambda lease: 0.0  # type: ignore[method-assign]
            updates.step(times=2)
            died, joined = (sum(word in event for event in updates.events) for word in ("died", "joined"))
            seen = {"died": died, "joined": joined, "second_leases": updates.controller.releases}
            told["places"].append({**place, **seen, "told": updates.told})
            updates.backend.close()
            print(json.dumps({**place, **seen}), file=sys.stderr, flush=True)
    return told


def histories(seeds: Sequence[int]) -> dict[str, Any]:
    """Numbers of workers and shards, sums on nodes, deaths, joins and second leases, all drawn at random."""
    told: dict[str, Any] = {"undisturbed": undisturbed(5), "histories": []}
    with cluster() as nodes:
        for _ in range(2):
            nodes.add_node(num_cpus=3)
        for seed in seeds:
            rng = np.random.default_rng(seed)
            most = int(rng.choice(WORKERS))
            drawn: dict[str, Any] = {"workers": {"min": int(rng.integers(1, most + 1)), "max": most}}
            drawn |= {"server_shards": int(rng.choice(SHARDS)), "node_sums": bool(rng.integers(2))}
            fixed = rng.random() < 0.25
            if fixed:
                drawn = {"workers": most, "topology": "allreduce"}
            updates = Updates(nodes.address, **drawn)
            twice = bool(rng.integers(2))
            if twice:
                updates.controller._patience = lambda lease: 0.0  # type: ignore[method-assign]
            killed = 0
            for _ in range(5):
                if rng.random() < 0.3 and not fixed:
                    killed += 1
                    someone = int(rng.choice(updates.backend.workers()))
                    updates.step(meanwhile=functools.partial(kill_worker, updates, someone))
                    continue
                if rng.random() < 0.3:
                    updates.until_workers(most)
                updates.step()
            history = {**drawn, "seed": seed, "second_leases": updates.controller.releases, "killed": killed}
            told["histories"].append({**history, "told": updates.told})
            updates.backend.close()
    return told


if __name__ == "__main__":
    known = {
        "come_and_go": come_and_go, "server_moves": server_moves, "lost_on_the_way": lost_on_the_way,
        "histories": histories, "grid": grid, "grows": grows,
    }  # fmt: skip
    name, *numbers = sys.argv[1:]
    print(json.dumps(known[name](*([list(map(int, numbers))] if numbers or name == "grid" else []))))
