"""The checks of nodes, storage and data. Each asks, and yields what it finds; the judging needs no cluster."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metadist.config import in_words
from metadist.config.schema import RuntimeConfig, WorkersRange
from metadist.doctor import probes
from metadist.doctor.findings import Finding
from metadist.doctor.place import Place, Subject
from metadist.errors import ClusterError
from metadist.progress import counted
from metadist.runtime.cluster import plan_workers
from metadist.runtime.ray_probe import NoAnswer, Node


def nodes(subject: Subject) -> Iterator[Finding]:
    """Every node answers."""
    if not subject.on_ray:
        return
    answered, failed = subject.answers("nodes", subject.place.ask(len, ()))
    yield from failed
    names = ", ".join(sorted(subject.place.nodes[n].name for n in answered))
    if answered:
        yield Finding("nodes", "ok", f"{counted(len(answered), 'node')}: {names}")


# --------------------------------------------------------------------------- versions


def versions(subject: Subject) -> Iterator[Finding]:
    """Python, torch, Ray and metadist are the same everywhere."""
    told, failed = subject.answers("versions", subject.place.ask(probes.versions))
    yield from failed
    if subject.place.here not in told:
        return
    wanted = told[subject.place.here]
    found = [f for n, has in told.items() for f in other_versions(wanted, has, subject.name(n))]
    yield from found
    if subject.submitter is not None and subject.submitter.get("code") != wanted.get("code"):
        yield Finding(
            "versions", "warning", f"the cluster runs metadist {_metadist(wanted)}",
            f"{_metadist(subject.submitter)}, as where this was typed",
            "install the same on both: a config is checked by one and run by the other",
        )  # fmt: skip
    if not found:
        same = ", ".join(f"{k} {v}" for k, v in wanted.items() if k != "code")
        yield Finding("versions", "ok", f"{same} on {counted(len(told), 'node')}")


def other_versions(wanted: Mapping[str, str], has: Mapping[str, str], node: str) -> Iterator[Finding]:
    """Where a node's versions differ from those of the driver's."""
    for name in ("python", "torch", "ray", "metadist"):
        if has[name] == wanted[name]:
            continue
        patch = name == "python" and has[name].split(".")[:2] == wanted[name].split(".")[:2]
        how = f"install Python {wanted[name]}" if name == "python" else f"`pip install {name}=={wanted[name]}`"
        yield Finding(
            "versions", "warning" if patch else "wrong", f"{name} {has[name]}",
            f"{name} {wanted[name]}, as on the driver's node", f"{how} there, and start Ray on the node again", node,
        )  # fmt: skip
    if has["metadist"] == wanted["metadist"] and has.get("code") != wanted.get("code"):
        yield Finding(
            "versions", "wrong", f"metadist {_metadist(has)}", f"{_metadist(wanted)}, as on the driver's node",
            "install the same commit of metadist on every node", node,
        )  # fmt: skip


def _metadist(has: Mapping[str, str]) -> str:
    return f"{has['metadist']} (code {has.get('code', 'not found')})"


# --------------------------------------------------------------------------- CPUs, GPUs, memory


def resources(subject: Subject) -> Iterator[Finding]:
    """There are the CPUs and GPUs that the workers need, and nobody else has them."""
    there = subject.place.nodes.values()
    kinds = sorted({kind for node in there for kind in node.accelerators})
    seen = ", ".join(f"{n.name} {n.cpus:g} CPUs" + f" {n.gpus:g} GPUs" * (n.gpus > 0) for n in there)
    if len(kinds) > 1:
        yield Finding(
            "resources", "warning", f"GPUs of several kinds: {', '.join(kinds)}",
            "one kind: each kind has last bits of its own",
            "keep to nodes of one kind, for example by a Ray cluster of those alone",
        )  # fmt: skip
    if subject.experiment is None or not subject.on_ray:
        yield Finding("resources", "ok", seen)
        return
    runtime = subject.experiment.config.runtime
    try:
        workers, gpus = planned(subject.place, runtime)
    except ClusterError as e:
        yield Finding("resources", "wrong", e.problem, f"enough for {e.where}", e.mend)
        return
    cpus = runtime.threads_per_worker
    least = runtime.workers.min if isinstance(runtime.workers, WorkersRange) else workers
    each = f"{cpus:g} CPU{'s' * (cpus != 1)}" + (f" and {gpus:g} GPUs" if gpus else "")
    fit, free = room(there, cpus, gpus), room(there, cpus, gpus, free=True)
    if fit < least and not subject.started_here:
        yield Finding(
            "resources", "wrong", f"room for {counted(fit, 'worker')} of {each} ({seen})", f"room for {least}",
            "lower runtime.workers, threads_per_worker or gpus_per_worker: a worker's share must be free on one node",
        )  # fmt: skip
    elif free < min(least, fit) and not subject.started_here:
        yield Finding(
            "resources", "warning", f"room for {counted(free, 'worker')} now, the rest is in use", f"room for {least}",
            "wait for the others, or see `ray status` for who they are",
        )  # fmt: skip
    else:
        yield Finding("resources", "ok", f"room for {counted(least, 'worker')} of {each}: {seen}")


def planned(place: Place, runtime: RuntimeConfig) -> tuple[int, float]:
    """How many workers a run has there, and how many GPUs for each: see :func:`plan_workers`, also for its errors."""
    there = place.nodes.values()
    return plan_workers(runtime, {"CPU": sum(n.cpus for n in there), "GPU": sum(n.gpus for n in there)})


def room(nodes: Any, cpus: float, gpus: float, free: bool = False) -> int:
    """Workers that fit, each on one node, and each fraction of a GPU within one GPU."""

    def on(node: Node) -> int:
        has_cpus, has_gpus = (node.free_cpus, node.free_gpus) if free else (node.cpus, node.gpus)
        by_cpus = int(has_cpus // cpus)
        if not gpus:
            return by_cpus
        return min(by_cpus, int(has_gpus // gpus) if gpus >= 1 else int(has_gpus * int(1 / gpus + 1e-9)))

    return sum(map(on, nodes))


def memory(subject: Subject) -> Iterator[Finding]:
    """Shared memory holds the object store, and the object store what a step puts there."""
    if not subject.on_ray:
        return
    told, failed = subject.answers("memory", subject.place.ask(probes.shared_memory))
    yield from failed
    workers = 1
    if subject.experiment is not None:
        given = subject.experiment.config.runtime.workers
        workers = int(given.max if isinstance(given, WorkersRange) else given if given != "auto" else len(told))
    need = needed_memory(subject.weights_bytes, workers)
    found = [
        f
        for n, has in told.items()
        for f in too_little_memory(subject.place.nodes[n].store, has["total"], has["free"], need, subject.name(n))
    ]
    yield from found
    if told and not found:
        least = min(told, key=lambda n: subject.place.nodes[n].store)
        store, free = subject.place.nodes[least].store, min(has["free"] for has in told.values())
        wants = f"; a step needs {in_words(need)}" if need else ""
        yield Finding("memory", "ok", f"object store {in_words(store)}, /dev/shm {in_words(free)} free{wants}")


def needed_memory(weights: int, workers: int) -> int:
    """Bytes of a node's object store of a step: two versions of the weights and of each worker's gradient."""
    return weights * (2 + 2 * workers)


def too_little_memory(store: int, total: int, free: int, need: int, node: str) -> Iterator[Finding]:
    """What is wrong with a node's shared memory.

    Args:
        store: bytes of its object store.
        total, free: bytes of its ``/dev/shm``.
        need: bytes that a step puts into the store.
        node: its name.
    """
    give = (
        "start its container with --shm-size (Docker), or an emptyDir of `medium: Memory` at /dev/shm (Kubernetes), of "
        "a third of the node's memory"
    )
    if total < store:
        yield Finding(
            "memory", "wrong", f"/dev/shm holds {in_words(total)}, so that the object store is on disk or cut",
            f"{in_words(store)}, what the object store is to have", give, node,
        )  # fmt: skip
    elif store < need:
        yield Finding(
            "memory", "wrong", f"an object store of {in_words(store)}", f"{in_words(need)} for a step",
            "`ray start --object-store-memory=BYTES`, fewer workers or runtime.node_sums: true", node,
        )  # fmt: skip
    elif free < need:
        yield Finding(
            "memory", "wrong", f"{in_words(free)} of /dev/shm are free", f"{in_words(need)} for a step",
            "end what else uses it (`ls -l /dev/shm`), or give the node more", node,
        )  # fmt: skip


# --------------------------------------------------------------------------- storage


def storage(subject: Subject) -> Iterator[Finding]:
    """Where runs and checkpoints are kept can be written, from every node if a person has named it."""
    path = None if subject.experiment is None else subject.experiment.config.checkpoint.path
    if subject.run_dir is None and path is None:
        yield from _place(subject, str(Path(subject.default_run_dir).expanduser().absolute()), "run directories", False)
    if subject.run_dir is not None:
        yield from _place(subject, str(Path(subject.run_dir).expanduser().absolute()), "--run-dir", True)
    if path is not None:
        yield from _place(subject, path if "://" in path else str(Path(path).absolute()), "checkpoint.path", True)


def _place(subject: Subject, place: str, what: str, everywhere: bool) -> Iterator[Finding]:
    """A file of the driver's is there while each other node looks for it and writes one of its own."""
    token, here = secrets.token_hex(8), subject.place.here
    kept = f".metadist-doctor-{token}"
    told = subject.place.ask(probes.write, place, kept, token, only=here)
    for node in [n for n in subject.place.nodes if everywhere and n != here]:
        name = f"{kept}-{node[:8]}"
        shared = subject.place.ask(probes.holds, place, kept, token, only=node)[node]
        wrote = subject.place.ask(probes.write, place, name, token, only=node)[node]
        told[node] = wrote if isinstance(wrote, NoAnswer) else {**wrote, "shared": shared is True}
        _take_away(subject, node, place, name, wrote)
    _take_away(subject, here, place, kept, told[here])
    answers, failed = subject.answers("storage", told)
    yield from failed
    found = [f for n, has in answers.items() for f in bad_storage(place, what, has, subject.name(n))]
    yield from found
    if not found and not failed:
        where = f"from {counted(len(answers), 'node')}" if everywhere else "by the driver"
        yield Finding("storage", "ok", f"{what} {place} can be written {where}")


def _take_away(subject: Subject, node: str, place: str, name: str, wrote: Any) -> None:
    if not isinstance(wrote, NoAnswer):
        subject.place.ask(probes.remove, place, name, wrote["made"], only=node)


def bad_storage(place: str, what: str, has: Mapping[str, Any], node: str) -> Iterator[Finding]:
    """What is wrong with a place, as a node has seen it."""
    if has["error"] is not None:
        yield Finding(
            "storage", "wrong", f"{what} {place} cannot be written ({has['error']})", "a place that can be written",
            f"mount it there for writing, see to its permissions and credentials, or name another {what}", node,
        )  # fmt: skip
    elif not has.get("shared", True):
        yield Finding(
            "storage", "warning", f"{what} {place} is another folder than the driver's", "one that all nodes share",
            f"name shared storage or a URL like s3://bucket/run as {what}; else a run cannot go on from another node",
            node,
        )  # fmt: skip


# --------------------------------------------------------------------------- shards


def shards(subject: Subject) -> Iterator[Finding]:
    """The shard set is there on every node, whole and the same."""
    tasks = subject.experiment.config.tasks if subject.experiment is not None else None
    if tasks is None or tasks.type != "shards":
        return
    path, left_out = tasks.path, tuple(tasks.left_out or ())
    told, failed = subject.answers("shards", subject.place.ask(probes.shards, path, left_out))
    yield from failed
    found = list(bad_shards(told, subject))
    yield from found
    if told and not found:
        first = next(iter(told.values()))
        size = f"{counted(first['shards'], 'shard')} of {in_words(first['bytes'])}, {first['content_id'][:19]}"
        yield Finding("shards", "ok", f"{path} on {counted(len(told), 'node')}: {size}")


def bad_shards(told: Mapping[str, Mapping[str, Any]], subject: Subject) -> Iterator[Finding]:
    """Nodes whose shard set cannot be read, or is another than the driver's."""
    wanted = told.get(subject.place.here, {}).get("content_id")
    for node, has in told.items():
        if has["error"] is not None:
            yield Finding(
                "shards", "wrong", has["error"], "the shard set on every node, under the same path",
                f"{has['mend']}; or put it on storage that all nodes share".lstrip("; "), subject.name(node),
            )  # fmt: skip
        elif wanted is not None and has["content_id"] != wanted:
            yield Finding(
                "shards", "wrong", f"another set: {has['content_id'][:19]}", f"{wanted[:19]}, the driver's",
                "copy the driver's set there, or put it on storage that all nodes share", subject.name(node),
            )  # fmt: skip
