"""Whatever happens to leases, workers and shards on the way, the versions have the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.config.schema import OuterConfig
from metadist.outer.gradient import partial_sums
from metadist.outer.partition import cut, joined_snapshot, part_of_options, part_of_snapshot
from metadist.outer.update import norm_of
from metadist.server import ParameterServer

SIZES = [7, 30, 1, 19, 40, 3]
NUMEL, VERSIONS, TASKS = sum(SIZES), 3, 6
OPTIONS = {**OuterConfig(lr=0.05, steps=10, clip_norm=1.0).model_dump(), "sizes": SIZES, "rules": []}


def gradients(version: int, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng([version + 1, count])
    return [(rng.normal(size=NUMEL) * 10.0 ** rng.uniform(-3, 3, NUMEL)).astype(np.float32) for _ in range(count)]


def servers(snapshot: dict[str, Any], shards: int) -> list[tuple[int, int, ParameterServer]]:
    made = []
    for a, z in cut(SIZES, shards):
        server = ParameterServer.at(part_of_snapshot(snapshot, a, z), part_of_options(OPTIONS, a, z))
        made.append((a, z, server))
    return made


def begin() -> dict[str, Any]:
    return {"version": 0, "weights": np.linspace(-1, 1, NUMEL, dtype=np.float32), "outer_state": {}}


def undisturbed(count: int) -> bytes:
    ((_, _, server),) = servers(begin(), 1)
    for version in range(VERSIONS):
        server.add(version, count, partial_sums(0, gradients(version, count), count))
        server.commit(version, TASKS)
    return server.weights().tobytes()


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[dict[str, Any]]]:
    """A number of microbatches, and for each version: shards, and answered leases in the order they come.

    Some cover what others have, some are of the version before, some are told twice; what is missing comes last.
    """
    count = draw(st.integers(1, 9))
    lease = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).map(lambda t: (min(t), max(t) + 1))
    late = st.tuples(lease, st.booleans())
    return count, [
        {"shards": draw(st.integers(1, 5)), "leases": draw(st.lists(late, max_size=8)), "again": draw(st.booleans())}
        for _ in range(VERSIONS)
    ]


@settings(deadline=None)
@given(histories())
def test_no_history_changes_a_bit(history: tuple[int, list[dict[str, Any]]]) -> None:
    count, versions = history
    snapshot = begin()
    for version, happened in enumerate(versions):
        parts = servers(snapshot, happened["shards"])  # everything died, and came back from the checkpoint
        answered: set[int] = set()

        def tell(start: int, stop: int, of: int) -> None:
            sums = partial_sums(start, gradients(of, count)[start:stop], count)
            for a, z, server in parts:  # noqa: B023
                server.add(of, count, {block: v[a:z] for block, v in sums.items()})

        for (start, stop), stale in happened["leases"]:
            tell(start, stop, version - 1 if stale else version)
            answered |= set() if stale else set(range(start, stop))
        for m in set(range(count)) - answered:
            tell(m, m + 1, version)
        norm = norm_of(x for _, _, server in parts for x in server.squares(version, TASKS))
        for _, _, server in parts:
            server.commit(version, TASKS, norm)
            if happened["again"]:
                server.commit(version, TASKS, norm)
        snapshot = joined_snapshot([server.snapshot() for _, _, server in parts])
        assert snapshot["version"] == version + 1
    assert snapshot["weights"].tobytes() == undisturbed(count)
