"""Workers and parameter server as Ray actors. The only file that says ``@ray.remote``.

The driver owns leases and membership and waits on references; weights and gradients go between workers
and server through the object store without passing through it. Workers are replaced, never restarted,
so that nothing runs twice behind the controller's back.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from metadist.config.schema import RuntimeConfig
from metadist.errors import ClusterError, MetadistError, first_line
from metadist.experiment import Experiment
from metadist.outer.gradient import Block, placed
from metadist.outer.partition import cut, joined_snapshot, part_of_options, part_of_snapshot
from metadist.outer.update import norm_of
from metadist.runtime.backend import ALLOCATOR, Computed, Died, Event, Joined
from metadist.server import ParameterServer
from metadist.worker import Lease, MetaWorker, Report

_START_TIMEOUT_S = 300.0
_CONNECT_TIMEOUT_S = 20.0


class LeaseWorker(Protocol):
    """What computes leases in a worker's process: :class:`metadist.worker.MetaWorker`, or what stands in for it."""

    def compute(self, lease: Lease, weights: Sequence[np.ndarray]) -> tuple[Report, dict[Block, np.ndarray]]:
        """See :meth:`metadist.worker.MetaWorker.compute`."""


MakeWorker = Callable[[Experiment, str], LeaseWorker]


@ray.remote
class _Worker:
    def __init__(self, experiment: Experiment, device: str, make: MakeWorker) -> None:
        self._experiment, self._device, self._make = experiment, device, make

    def ready(self) -> dict[str, Any]:
        # Not in the constructor, whose errors reach the driver as text alone.
        self._worker = self._make(self._experiment, self._device)
        return {"pid": os.getpid(), "torch": torch.__version__, "threads": torch.get_num_threads()}

    def compute(
        self, lease: Lease, cuts: list[tuple[int, int]], *weights: np.ndarray
    ) -> tuple[Report | dict[Block, np.ndarray], ...]:
        """The report, and what is for each shard of the server, whose weights came in the same order."""
        report, blocks = self._worker.compute(lease, weights)
        return report, *({block: v[a:z] for block, v in blocks.items()} for a, z in cuts)


@ray.remote
class _Shard:
    def __init__(self, snapshot: dict[str, Any], options: dict[str, Any], threads: int) -> None:
        self._server = ParameterServer.at(snapshot, options, threads)

    def weights(self) -> np.ndarray:
        return self._server.weights()

    def add(self, version: int, count: int, blocks: dict[Block, np.ndarray], slot: int | None, weight: float) -> int:
        return self._server.add(version, count, placed(blocks, slot, weight))

    def squares(self, version: int, tasks: float, slots: Sequence[int] | None) -> list[float]:
        return self._server.squares(version, tasks, slots)

    def commit(
        self, version: int, tasks: float, norm: float | None, slots: Sequence[int] | None
    ) -> tuple[np.ndarray, dict[str, float]]:
        return self._server.commit(version, tasks, norm, slots)

    def snapshot(self) -> dict[str, Any]:
        return self._server.snapshot()


@dataclass
class _Handle:
    actor: ActorHandle
    starting: ObjectRef | None
    answers: dict[ObjectRef, tuple[Lease, list[ObjectRef]]] = field(default_factory=dict)


class RayBackend:
    """A parameter server and ``runtime.workers`` workers on a Ray cluster, one started here if none is named.

    The server is ``runtime.server_shards`` actors, each with a part of the flat vector; workers send each its part.

    Args:
        experiment: what is run, with ``engine.strategy`` decided.
        make_worker: ``make_worker(experiment, device)``, called in each worker's process.

    Raises:
        ClusterError: the cluster cannot be reached or has not the GPUs asked for.
    """

    def __init__(self, experiment: Experiment, make_worker: MakeWorker = MetaWorker) -> None:
        self._experiment, self._make_worker = experiment, make_worker
        self._runtime = experiment.config.runtime
        self._handles: dict[int, _Handle] = {}
        self._answered: dict[int, list[ObjectRef]] = {}
        self._adding: list[ObjectRef] = []
        self._next_worker = 0
        self._restarts = {"worker": 0, "server": 0}
        self._shards: list[ActorHandle] = []
        self._cuts: list[tuple[int, int]] = []
        self._started_here = connect(self._runtime)
        try:
            self._workers, self._gpus = plan_workers(self._runtime, ray.cluster_resources())
        except MetadistError:
            self.close()
            raise

    def start(self, snapshot: dict[str, Any], outer: dict[str, Any]) -> None:
        self._experiment_ref = ray.put(self._experiment)
        self._cuts = cut(outer["sizes"], self._runtime.server_shards)
        # Shards compute nothing to speak of but move much: each on another node, as far as there are nodes.
        where = {
            "num_cpus": 0,
            "max_restarts": 0,
            "scheduling_strategy": "SPREAD" if len(self._cuts) > 1 else "DEFAULT",
        }
        for a, z in self._cuts:
            part, options = part_of_snapshot(snapshot, a, z), part_of_options(outer, a, z)
            made = _Shard.options(**where).remote(part, options, self._runtime.threads_per_worker)  # type: ignore[attr-defined]
            self._shards.append(made)
        self._weights = [shard.weights.remote() for shard in self._shards]
        for _ in range(self._workers):
            self._hire()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self.workers():
            if time.monotonic() > deadline:
                raise ClusterError(
                    "runtime",
                    f"no worker became ready in {_START_TIMEOUT_S:.0f} s",
                    "see what the cluster has with `ray status`, or lower runtime.workers",
                )
            self.wait(1.0)

    def idle(self) -> list[int]:
        return [n for n, h in self._handles.items() if h.starting is None and not h.answers]

    def workers(self) -> list[int]:
        return [n for n, h in self._handles.items() if h.starting is None]

    def lease(self, worker: int, lease: Lease) -> None:
        handle = self._handles[worker]
        options = {"num_returns": 1 + len(self._cuts)}
        refs: list[ObjectRef] = handle.actor.compute.options(**options).remote(lease, self._cuts, *self._weights)
        report, *gradients = refs
        handle.answers[report] = (lease, gradients)

    def wait(self, timeout: float) -> list[Event]:
        waiting = [r for h in self._handles.values() for r in ([h.starting] if h.starting else list(h.answers))]
        if not waiting:
            time.sleep(min(timeout, 0.1))
            return []
        first, _ = ray.wait(waiting, num_returns=1, timeout=timeout)
        if not first:
            return []
        ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        arrived = set(ready) | set(first)
        events: list[Event] = []
        for number, handle in list(self._handles.items()):
            for ref in [r for r in ([handle.starting] if handle.starting else list(handle.answers)) if r in arrived]:
                if number in self._handles:
                    events.append(self._event(number, handle, ref))
        return events

    def accept(self, lease: Lease, version: int, count: int, slot: int | None = None, weight: float = 1.0) -> None:
        for shard, part in zip(self._shards, self._answered.pop(lease.number), strict=True):
            self._adding.append(shard.add.remote(version, count, part, slot, weight))

    def drop(self, lease: Lease) -> None:
        self._answered.pop(lease.number, None)

    def commit(self, version: int, tasks: float, slots: Sequence[int] | None = None) -> dict[str, float]:
        adding, self._adding = self._adding, []
        norm = None
        if len(self._shards) > 1:
            squares = [s.squares.remote(version, tasks, slots) for s in self._shards]
            norm = norm_of(itertools.chain(*self._from_server(squares)))
        made: list[Any] = [s.commit.options(num_returns=2).remote(version, tasks, norm, slots) for s in self._shards]
        self._from_server(adding)
        result: dict[str, float] = self._from_server([stats for _, stats in made])[0]
        self._weights = [weights for weights, _ in made]
        return result

    def snapshot(self) -> dict[str, Any]:
        # A consistent cut: calls of one caller are in order, and none commits in between.
        return joined_snapshot(self._from_server([s.snapshot.remote() for s in self._shards]))

    def restarts(self) -> dict[str, int]:
        return dict(self._restarts)

    def describe(self) -> dict[str, Any]:
        device = "cuda" if self._gpus else "cpu"
        return {
            "type": "ray",
            "ray": ray.__version__,
            "workers": self._workers,
            "device": device,
            "gpus_per_worker": self._gpus,
            "server_shards": len(self._shards) or self._runtime.server_shards,
        }

    def close(self) -> None:
        for handle in self._handles.values():
            _kill(handle.actor)
        for shard in self._shards:
            _kill(shard)
        self._handles.clear()
        self._shards.clear()
        if self._started_here:
            ray.shutdown()

    # ----------------------------------------------------------------- workers

    def _hire(self) -> None:
        options = {
            "num_cpus": self._runtime.threads_per_worker,
            "num_gpus": self._gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        device = "cuda" if self._gpus else "cpu"
        actor = _Worker.options(**options).remote(self._experiment_ref, device, self._make_worker)  # type: ignore[attr-defined]
        self._handles[self._next_worker] = _Handle(actor, actor.ready.remote())
        self._next_worker += 1

    def _event(self, number: int, handle: _Handle, ref: ObjectRef) -> Event:
        try:
            value = ray.get(ref)
        except RayTaskError as e:
            raise _cause(e) from e
        except RayActorError as e:
            return self._replace(number, first_line(e))
        if ref == handle.starting:
            handle.starting = None
            return Joined(number)
        lease, gradients = handle.answers.pop(ref)
        if lease.round.kind == "train":
            self._answered[lease.number] = gradients
        return Computed(number, value)

    def dismiss(self, worker: int, reason: str) -> Died:
        return self._replace(worker, reason)

    def _replace(self, number: int, reason: str) -> Died:
        # The actor may still live if it was only out of reach, or hangs.
        _kill(self._handles.pop(number).actor)
        self._restarts["worker"] += 1
        if self._restarts["worker"] > self._runtime.max_worker_restarts:
            raise ClusterError(
                "runtime",
                f"{self._restarts['worker']} workers died, the last of: {reason}",
                "raise runtime.max_worker_restarts if that is to be expected; memory is the usual cause",
            )
        self._hire()
        return Died(number, reason)

    def _from_server(self, refs: Any) -> Any:
        try:
            return ray.get(refs)
        except RayTaskError as e:
            raise _cause(e) from e
        except RayError as e:
            raise ClusterError(
                "parameter server",
                f"is gone ({first_line(e)})",
                "go on from the last checkpoint with `metadist resume`",
            ) from e


def connect(runtime: RuntimeConfig) -> bool:
    """Joins the cluster the config names, or starts one on this machine; True if it was started here."""
    if ray.is_initialized():
        return False
    environment = {
        "GLIBC_TUNABLES": ALLOCATOR,
        "OMP_NUM_THREADS": str(runtime.threads_per_worker),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([os.getcwd(), *filter(None, sys.path)])),
    }
    common: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": runtime.worker_logs,
        "configure_logging": True,
    }
    if runtime.address is None:
        workers = _local_workers(runtime)
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=max(workers * runtime.threads_per_worker, 1),
            runtime_env={"env_vars": environment},
            **common,
        )
        _protect_token()
        return True
    _check_reachable(runtime.address)
    del environment["PYTHONPATH"]
    try:
        ray.init(address=runtime.address, runtime_env={"env_vars": environment}, **common)
    except (ConnectionError, RuntimeError, ValueError, RayError) as e:
        raise _unreachable(runtime.address, first_line(e)) from e
    return True


def plan_workers(runtime: RuntimeConfig, resources: dict[str, float]) -> tuple[int, float]:
    """How many workers, and how many GPUs for each, on a cluster with ``resources``.

    Raises:
        ClusterError: it has not the GPUs or CPUs that the config asks for.
    """
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    each = (1.0 if gpus >= 1 else 0.0) if runtime.gpus_per_worker == "auto" else float(runtime.gpus_per_worker)
    fit = int(gpus / each) if each else int(cpus // runtime.threads_per_worker)
    workers = max(1, fit) if runtime.workers == "auto" else runtime.workers
    if each and fit < workers:
        raise ClusterError(
            "runtime.gpus_per_worker",
            f"{workers} workers with {each:g} GPUs each need {workers * each:g}, the cluster has {gpus:g}",
            "lower runtime.workers or runtime.gpus_per_worker (fractions share a GPU), or write gpus_per_worker: 0",
        )
    if runtime.address is not None and cpus < workers * runtime.threads_per_worker:
        raise ClusterError(
            "runtime.workers",
            f"{workers} workers need {workers * runtime.threads_per_worker} CPUs, the cluster has {cpus:g}",
            "lower runtime.workers or write auto",
        )
    return workers, each


def _local_workers(runtime: RuntimeConfig) -> int:
    if runtime.workers != "auto":
        return runtime.workers
    return os.cpu_count() or 1


def _check_reachable(address: str) -> None:
    """Fails within seconds where Ray's own client would retry for minutes."""
    if address == "auto" or "://" in address or ":" not in address:
        return
    import socket

    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as e:
        raise _unreachable(address, str(e)) from e


def _unreachable(address: str, why: str) -> ClusterError:
    return ClusterError(
        "runtime.address",
        f"no Ray cluster answers at {address} ({why})",
        "check the address, start a head with `ray start --head`, or write address: null to start one here",
    )


def _protect_token() -> None:
    """Ray writes the cluster's access token readable by every user of the machine."""
    with contextlib.suppress(OSError):
        token = Path.home() / ".ray" / "auth_token"
        if token.exists():
            token.chmod(0o600)


def _cause(error: RayTaskError) -> BaseException:
    """The error as it was raised in the actor."""
    cause = error.cause if isinstance(getattr(error, "cause", None), BaseException) else None
    return cause if cause is not None else error


def _kill(actor: ActorHandle) -> None:
    with contextlib.suppress(Exception):
        ray.kill(actor)
