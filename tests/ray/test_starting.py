"""A run begins when the workers it needs are there: it says what it waits for, and does not wait for ever."""

from __future__ import annotations

import pytest

from metadist.errors import ClusterError
from metadist.runtime.ray import RayBackend
from metadist.runtime.ray_worker import WorkerProcess
from metadist.runtime.transport import transport_named
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


def test_a_gpu_that_pytorch_does_not_find_is_told_with_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    made: list[str] = []
    process = WorkerProcess(settings()[0], "cuda", lambda _, device: made.append(device), transport_named("auto"))
    with pytest.raises(ClusterError, match=r"node [0-9.]+: Ray gave a worker a GPU here, but PyTorch finds none"):
        process.ready()
    assert not made
