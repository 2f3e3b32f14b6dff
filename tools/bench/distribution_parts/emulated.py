"""Workers that compute nothing, for the cost of everything else; and the runs they work in."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metadist.config import validate
from metadist.experiment import Experiment
from metadist.models import Conv4
from metadist.outer.gradient import Block, partial_sums
from metadist.outer.vectors import Room, copy_into
from metadist.runtime.controller import Controller
from metadist.runtime.ray import RayBackend
from metadist.simulator import PlainPace
from metadist.worker import Lease, Report, Round


def shapes(model: str) -> list[tuple[int, ...]]:
    """Of a model's parameters: ``conv4`` of Omniglot (0.45 MB), or ``100`` for so many MB in float32."""
    if model == "conv4":
        return [tuple(p.shape) for p in Conv4(1, 5).parameters()]
    # As of a transformer's blocks: square matrices, and a vector with each.
    width = 1024
    blocks = max(1, round(float(model) * 250_000 / (width * width + width)))
    return [(width, width), (width,)] * blocks


def numbers(model: str) -> int:
    """How many parameters a model has."""
    return sum(math.prod(s) for s in shapes(model))


def gradient(numel: int, microbatch: int) -> np.ndarray:
    """The gradient that microbatch ``microbatch`` is said to have, ``[numel]`` float32."""
    return np.resize(np.random.default_rng(microbatch).normal(size=min(numel, 9973)).astype(np.float32), numel)


class EmulatedWorker:
    """Answers as a :class:`metadist.worker.MetaWorker` does, with made-up gradients, after a timed wait.

    Args:
        numel: numbers in the flat vector.
        seconds: the wait for each microbatch.
        experiment, device: as of ``MetaWorker``; not looked at.
    """

    def __init__(self, numel: int, seconds: float, experiment: Experiment, device: str) -> None:
        torch.set_num_threads(1)
        self._numel, self._seconds = numel, seconds
        self._made: dict[int, np.ndarray] = {}
        self._there: dict[int, int] = {}
        self._params: np.ndarray | None = None

    def compute(
        self, lease: Lease, weights: Sequence[np.ndarray], room: Room | None = None
    ) -> tuple[Report, dict[Block, np.ndarray]]:
        """The lease's gradients, made once for each microbatch; weights of one shard are used where they lie.

        That of a lease of one microbatch lies where ``room`` says, as a real worker's does; it is copied there if it
        was another's that lay there.
        """
        self._params = weights[0] if len(weights) == 1 else np.concatenate(weights)
        members = range(lease.start, lease.stop)
        for m in members:
            if m not in self._made:
                self._made[m] = gradient(self._numel, m)
        made = self._made
        if room is not None and len(members) == 1:
            made = {lease.start: self._lying_at(room(self._numel, np.float32), lease.start)}
        wait = self._seconds * len(members)
        if wait:
            time.sleep(wait)
        tasks = sum(len(lease.round.episodes(m)) for m in members)
        report = Report(lease, {"loss": np.zeros(tasks)}, wait, 0.0)
        return report, partial_sums(lease.start, (made[m] for m in members), lease.round.microbatches)

    def _lying_at(self, place: np.ndarray, microbatch: int) -> np.ndarray:
        if self._there.get(place.ctypes.data) != microbatch:
            copy_into(place, self._made[microbatch])
            self._there[place.ctypes.data] = microbatch
        return place


class OneSlowWorker(EmulatedWorker):
    """The worker whose process comes first to ``mark`` waits ``factor`` times as long as the others.

    Args:
        mark: a file that does not exist yet.
        factor: how much slower it is.
        numel, seconds, experiment, device: as of :class:`EmulatedWorker`.
    """

    def __init__(
        self, mark: Path, factor: float, numel: int, seconds: float, experiment: Experiment, device: str
    ) -> None:
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            seconds *= factor
        except FileExistsError:
            pass
        super().__init__(numel, seconds, experiment, device)


class EmulatedRun:
    """A training loop over Ray with emulated workers: everything real but what workers compute.

    Args:
        model: see :func:`shapes`.
        workers: how many.
        microbatches: of a step; None: one a worker.
        seconds: that a worker waits for each.
        shards: of the parameter server.
        make_worker: ``(numel, seconds, experiment, device)`` in place of :class:`EmulatedWorker`.
        equal_shares: every worker gets as much, however fast it was, and nothing is leased twice.
    """

    def __init__(
        self, model: str, workers: int, microbatches: int | None = None, seconds: float = 0.0, shards: int = 1,
        make_worker: Any = EmulatedWorker, equal_shares: bool = False,
    ) -> None:  # fmt: skip
        self.numel, self.count = numbers(model), microbatches or workers
        config = validate({
            "tasks": {"type": "sinusoid"}, "model": {"type": "mlp"}, "algorithm": {"type": "maml"},
            "outer": {"lr": 1e-3, "steps": 10**6, "meta_batch_size": self.count, "tasks_per_microbatch": 1},
            "runtime": {"workers": workers, "server_shards": shards, "gpus_per_worker": 0},
        }, "the benchmark")  # fmt: skip
        self.backend = RayBackend(Experiment(config), functools.partial(make_worker, self.numel, seconds))
        outer = {**config.outer.model_dump(), "sizes": [math.prod(s) for s in shapes(model)], "rules": []}
        start = {"version": 0, "weights": np.zeros(self.numel, np.float32), "outer_state": {}}
        self.backend.start(start, outer)
        self.controller = Controller(self.backend)
        if equal_shares:
            self.controller.pace = PlainPace(self.controller.pace.timeout_s)
        while len(self.backend.workers()) < workers:
            self.backend.wait(1.0)
        self.version = 0

    def steps(self, count: int) -> list[float]:
        """Meta-updates one after another, as a run makes them; the seconds of each."""
        times, last = [], time.perf_counter()
        for _ in range(count):
            self._step()
            times.append(time.perf_counter() - last)
            last += times[-1]
        return times

    def _step(self) -> None:
        version = self.version
        self.controller.run(Round("train", version, "train", "train", version * self.count, self.count, 1))
        self.backend.commit(version, self.count)
        self.version += 1

    def weights(self) -> np.ndarray:
        """The flat meta-parameters."""
        return np.asarray(self.backend.snapshot()["weights"])

    def close(self) -> None:
        """Ends the actors."""
        self.backend.close()
