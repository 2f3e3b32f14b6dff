"""What the tests of Ray share."""

from __future__ import annotations

from collections.abc import Iterator

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
