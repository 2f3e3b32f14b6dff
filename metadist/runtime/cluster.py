"""The Ray cluster a run is on: joined or started here, what it has, which of its nodes are about to go."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import ray
from ray.exceptions import RayError

from metadist.config.schema import RuntimeConfig, WorkersRange
from metadist.errors import ClusterError, first_line
from metadist.runtime.backend import ALLOCATOR, WITHIN_MESSAGES
from metadist.runtime.tokens import forget_token, token_refusal, turned_on_by_ray, use_token_given

_CONNECT_TIMEOUT_S = 20.0
_WITHIN_BY_DEFAULT = 100 * 1024
_OVERHEAD = 4096
"""Bytes that a message has beside the array in it, at the most."""
_started: set[str] = set()
"""Addresses of the clusters that this process has started."""
# Ray starts a process for each CPU before anybody asks. Ours have an environment of their own: those would wait idle,
# and take from the first seconds of a run what its workers need.
_NOTHING_BEFOREHAND = {"enable_worker_prestart": False, "prestart_worker_first_driver": False}


def connect(runtime: RuntimeConfig) -> bool:
    """Joins the cluster the config names, or starts one on this machine; True if it was started here."""
    if ray.is_initialized():
        return False
    environment = {
        "GLIBC_TUNABLES": ALLOCATOR,
        "OMP_NUM_THREADS": str(runtime.threads_per_worker),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path)),
    }
    common: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": runtime.worker_logs,
        "configure_logging": True,
    }
    if runtime.address is None:
        workers = _local_workers(runtime)
        with turned_on_by_ray():
            ray.init(
                address="local",
                include_dashboard=False,
                num_cpus=max(workers * runtime.threads_per_worker, 1),
                runtime_env={"env_vars": environment},
                _system_config={"max_direct_call_object_size": WITHIN_MESSAGES, **_NOTHING_BEFOREHAND},
                **common,
            )
        _started.add(ray.get_runtime_context().gcs_address)
        return True
    forget_token()
    _check_reachable(runtime.address)
    del environment["PYTHONPATH"]
    try:
        ray.init(address=runtime.address, runtime_env={"env_vars": environment}, **common)
    except (ConnectionError, RuntimeError, ValueError, RayError) as e:
        raise (
            token_refusal(runtime.address, e)
            or _other_version(runtime.address, e)
            or _unreachable(runtime.address, first_line(e))
        ) from e
    return True


def within_messages() -> int:
    """The bytes of an array that Ray surely sends within the message that would name it.

    A cluster that :func:`connect` has not started may allow more than Ray does by itself, but does not say.
    """
    ours = ray.get_runtime_context().gcs_address in _started
    return (WITHIN_MESSAGES if ours else _WITHIN_BY_DEFAULT) - _OVERHEAD


def plan_workers(runtime: RuntimeConfig, resources: dict[str, float]) -> tuple[int, float]:
    """How many workers, and how many GPUs for each, on a cluster with ``resources``.

    Of a range it is the most: on a cluster, room for them may come later; on this machine alone it will not.

    Raises:
        ClusterError: it has not the GPUs or CPUs that the config asks for.
    """
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    each = (1.0 if gpus >= 1 else 0.0) if runtime.gpus_per_worker == "auto" else float(runtime.gpus_per_worker)
    fit = int(gpus / each) if each else int(cpus // runtime.threads_per_worker)
    if isinstance(runtime.workers, WorkersRange):
        return _as_many_as_here(runtime.workers, fit) if runtime.address is None else runtime.workers.max, each
    workers = max(1, fit) if runtime.workers == "auto" else runtime.workers
    if each and fit < workers:
        raise ClusterError(
            "runtime.gpus_per_worker",
            f"{workers} workers with {each:g} GPUs each need {workers * each:g}, the cluster has {gpus:g}",
            "lower runtime.workers or runtime.gpus_per_worker (fractions share a GPU), or write gpus_per_worker: 0"
            + _or_wait(runtime, workers),
        )
    if runtime.address is not None and cpus < workers * runtime.threads_per_worker:
        raise ClusterError(
            "runtime.workers",
            f"{workers} workers need {workers * runtime.threads_per_worker} CPUs, the cluster has {cpus:g}",
            "lower runtime.workers or write auto" + _or_wait(runtime, workers),
        )
    return workers, each


def _or_wait(runtime: RuntimeConfig, workers: int) -> str:
    return f"; for a cluster that grows write workers: {{min: 1, max: {workers}}}" if runtime.address else ""


def _local_workers(runtime: RuntimeConfig) -> int:
    fit = max(1, (os.cpu_count() or 1) // runtime.threads_per_worker)
    if isinstance(runtime.workers, WorkersRange):
        return _as_many_as_here(runtime.workers, fit)
    return fit if runtime.workers == "auto" else runtime.workers


def _as_many_as_here(wanted: WorkersRange, fit: int) -> int:
    return max(wanted.min, min(wanted.max, fit))


def draining_nodes() -> set[str]:
    """Ids of the nodes that take nothing new and will be gone: drained by an autoscaler, a preemption or a person."""
    # Ray has no public way to ask; this is what Ray Train does.
    from ray._private.state import state

    return set(state.get_draining_nodes())


def free_by_node() -> dict[str, dict[str, float]]:
    """What of its resources each node has left, by its id."""
    # Ray's public figure is the sum over all nodes, in which the remains of two nodes look like room on one.
    from ray._private.state import available_resources_per_node

    return dict(available_resources_per_node())


def room_for_workers(cpus: float, gpus: float, draining: set[str]) -> int:
    """How many more workers with so many CPUs and GPUs each could begin now, on nodes that stay."""
    wanted = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    free = [left for node, left in free_by_node().items() if node not in draining]
    return sum(min(int(left.get(name, 0.0) / amount) for name, amount in wanted.items()) for left in free)


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
    refused = _refused(address)
    if refused and use_token_given():
        refused = _refused(address)
        if refused:
            forget_token()
    if refused:
        raise refused


def _refused(address: str) -> ClusterError | None:
    """Asks as Ray's own client does, which takes a minute to fail."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    try:
        GcsClient(address=address)
    except Exception as e:
        return token_refusal(address, e)
    return None


def _other_version(address: str, error: Exception) -> ClusterError | None:
    if "Version mismatch" not in str(error):
        return None
    said = " ".join(str(error).split())
    return ClusterError(
        address, said.removesuffix("."), "use the cluster's Python and Ray here, or these on every node"
    )


def _unreachable(address: str, why: str) -> ClusterError:
    return ClusterError(
        "runtime.address",
        f"no Ray cluster answers at {address} ({why})",
        "check the address, start a head with `ray start --head`, or write address: null to start one here",
    )
