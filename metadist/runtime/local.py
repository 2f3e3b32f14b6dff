"""Everything in this process: one worker, no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from metadist.device import device_here
from metadist.errors import ServerLostError
from metadist.experiment import Experiment
from metadist.outer.gradient import Block, placed
from metadist.rounds import Lease
from metadist.runtime.backend import Computed, Died, Event
from metadist.server import ParameterServer
from metadist.worker import MetaWorker


class LocalBackend:
    """One worker and the server, called in turn.

    Args:
        experiment: what is run, with ``engine.strategy`` decided.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._device = device_here(experiment.config.runtime.gpus_per_worker)
        self._pending: list[Lease] = []
        self._answers: dict[int, dict[Block, np.ndarray]] = {}
        self._threads = torch.get_num_threads()

    def start(self, snapshot: dict[str, Any], outer: dict[str, Any]) -> None:
        self._worker = MetaWorker(self._experiment, self._device)
        self._server = ParameterServer.at(snapshot, outer)
        self._weights = self._server.weights()

    def idle(self) -> list[int]:
        return [] if self._pending else [0]

    def workers(self) -> list[int]:
        return [0]

    def lease(self, worker: int, lease: Lease) -> None:
        self._pending.append(lease)

    def wait(self, timeout: float) -> list[Event]:
        events: list[Event] = []
        for lease in self._pending:
            report, self._answers[lease.number] = self._worker.compute(lease, [self._weights])
            events.append(Computed(0, report))
        self._pending = []
        return events

    def dismiss(self, worker: int, reason: str) -> Died:
        raise AssertionError("the worker of this process is never silent")

    def accept(self, lease: Lease, version: int, count: int, slot: int | None = None, weight: float = 1.0) -> None:
        self._server.add(version, count, placed(self._answers.pop(lease.number), slot, weight))

    def drop(self, lease: Lease) -> None:
        self._answers.pop(lease.number, None)

    def settle(self) -> list[Lease]:
        return []

    def commit(
        self,
        version: int,
        tasks: float,
        slots: Sequence[int] | None = None,
    ) -> dict[str, float]:
        self._weights, stats = self._server.commit(version, tasks, slots=slots)
        return stats

    def restore(self, snapshot: dict[str, Any], error: ServerLostError) -> None:
        raise AssertionError("the server of this process is never lost")

    def snapshot(self) -> dict[str, Any]:
        return self._server.snapshot()

    def restarts(self) -> dict[str, int]:
        return {"worker": 0, "server": 0}

    def describe(self) -> dict[str, Any]:
        return {"type": "local", "workers": 1, "device": self._device}

    def close(self) -> None:
        if hasattr(self, "_worker"):
            self._worker.close()
        torch.set_num_threads(self._threads)
