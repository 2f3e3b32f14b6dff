"""What the tests of Ray share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """A Ray cluster started as a run starts its own, which the runs of this process then join and leave running."""
    import ray

    from metadist.config.schema import RuntimeConfig
    from metadist.runtime.cluster import connect

    assert connect(RuntimeConfig(workers=3)), "another test left its cluster running"
    yield
    ray.shutdown()


@pytest.fixture
def started() -> Iterator[Callable[..., Any]]:
    """``started(worker, **runtime)``: a backend of two workers that has begun; all are closed in the end."""
    from metadist.runtime.ray import RayBackend
    from tests.ray.several_nodes import settings

    made: list[RayBackend] = []

    def start(worker: Any, **runtime: Any) -> RayBackend:
        experiment, outer, snapshot = settings(workers=2, **runtime)
        made.append(RayBackend(experiment, worker))
        made[-1].start(snapshot, outer)
        return made[-1]

    yield start
    for there in made:
        there.close()
