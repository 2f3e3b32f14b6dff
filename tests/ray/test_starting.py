"""A run begins when the workers it needs are there: it says what it waits for, and does not wait for ever."""

from __future__ import annotations

import pytest

from metadist.errors import ClusterError
from metadist.runtime.ray import RayBackend
from tests.ray.several_nodes import Worker, settings

ROOM = 3
"""Workers that the cluster has room for."""


@pytest.mark.usefixtures("cluster")
def test_workers_that_do_not_come_are_told_and_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("metadist.progress._LINE_S", 0.5)
    experiment, outer, snapshot = settings(workers={"min": ROOM + 1, "max": ROOM + 1}, start_timeout_s=4.0)
    backend = RayBackend(experiment, Worker)
    try:
        with pytest.raises(ClusterError) as raised:
            backend.start(snapshot, outer)
        there = len(backend.workers())
    finally:
        backend.close()
    assert there <= ROOM
    came = f"{there or 'no'} worker{'' if there == 1 else 's'} became ready"
    assert str(raised.value).startswith(
        f"runtime: {came}, {ROOM + 1} wanted, and no other came in 4 s (runtime.start_timeout_s)"
    )
    assert f"waiting for workers, {there} of {ROOM + 1}" in capsys.readouterr().err
