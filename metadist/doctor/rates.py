"""How fast objects go into and out of the store, and from node to node."""

from __future__ import annotations

from collections.abc import Iterator

from metadist.config import in_words
from metadist.doctor.findings import Finding
from metadist.doctor.place import Subject

_MOST = 64 << 20
_SLOW_STORE, _SLOW_NETWORK = 100e6, 12.5e6
_WARNING = "a step sends the weights to every worker, and a gradient back"


def object_store(subject: Subject) -> Iterator[Finding]:
    """Rates of put and get on each node."""
    size = _size(subject)
    told, failed = subject.answers("object store", subject.place.store_rates(size))
    yield from failed
    slow = False
    for node, seconds in told.items():
        if size / max(seconds) < _SLOW_STORE:
            slow = True
            yield Finding(
                "object store", "warning", f"{_rates(size, seconds)} for {in_words(size)}",
                f"{in_words(int(_SLOW_STORE))}/s: {_WARNING}",
                "see that /dev/shm is memory and that the node does not swap (`free -m`)", subject.name(node),
            )  # fmt: skip
    if told and not slow:
        slowest = tuple(max(seconds[i] for seconds in told.values()) for i in (0, 1))
        yield Finding("object store", "ok", f"{_rates(size, slowest)}, at least")


def network(subject: Subject) -> Iterator[Finding]:
    """The rate from each node to the next."""
    size, best = _size(subject), []
    for (giver, taker), seconds in subject.place.transfers(size).items():
        between = f"{subject.name(giver)} to {subject.name(taker)}"
        if not isinstance(seconds, float):
            yield Finding(
                "network", "wrong", f"nothing comes through: {seconds.reason}", "objects go from each node to each",
                "open all ports between the nodes (Ray's workers take any), and give `ray start` addresses that the "
                "others reach", between,
            )  # fmt: skip
        elif size / seconds < _SLOW_NETWORK:
            yield Finding(
                "network", "warning", f"{in_words(int(size / seconds))}/s",
                f"{in_words(int(_SLOW_NETWORK))}/s: {_WARNING}{_weights(subject)}",
                "see which network `ray start --node-ip-address` names; runtime.node_sums and runtime.wire send less",
                between,
            )  # fmt: skip
        else:
            best.append(size / seconds)
    if best:
        yield Finding("network", "ok", f"{in_words(int(min(best)))}/s from node to node, at least{_weights(subject)}")


def _size(subject: Subject) -> int:
    return min(_MOST, *(n.store // 8 or _MOST for n in subject.place.nodes.values()))


def _weights(subject: Subject) -> str:
    return f"; the weights are {in_words(subject.weights_bytes)}" if subject.weights_bytes else ""


def _rates(size: int, seconds: tuple[float, ...]) -> str:
    put, get = (in_words(int(size / s)) for s in seconds)
    return f"put {put}/s, get {get}/s"
