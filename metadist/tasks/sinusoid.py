"""Regression on sine waves, the first experiment of MAML (Finn et al. 2017, §5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from metadist.episode import Episode, EpisodeBatch, Examples
from metadist.errors import ConfigError
from metadist.seeding import Rng
from metadist.tasks.base import SPLITS, TaskSource

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, float(np.pi))
INPUT = (-5.0, 5.0)


class SinusoidTasks(TaskSource):
    """Fit one wave ``y = a sin(x - p)`` from a few of its points.

    As in the paper: amplitude ``a`` uniform in [0.1, 5.0), phase ``p`` in [0, pi), inputs ``x`` in [-5, 5), no noise;
    loss is the mean squared error. The paper trains with 10 points and judges with 5, 10 and 20.

    Args:
        shots: support points, at least 1.
        query_shots: query points, at least 1.

    An episode has ``support.x`` and ``support.y`` float32 ``[shots, 1]``, the query likewise with ``query_shots``;
    ``info`` holds ``amplitude`` and ``phase``. Every split draws from the one distribution; streams keep them apart.

    Raises:
        ConfigError: if a number is below 1.
    """

    def __init__(self, shots: int = 10, query_shots: int = 10) -> None:
        for name, value in (("shots", shots), ("query_shots", query_shots)):
            if value < 1:
                raise ConfigError(f"tasks.{name}", f"is {value}", "give at least 1")
        self.shots, self.query_shots = shots, query_shots

    def split(self, name: str) -> SinusoidTasks:
        """The source itself: its waves are endless, so nothing has to be held out."""
        if name not in SPLITS:
            raise ConfigError("tasks.split", f"is {name!r}", f"choose one of {', '.join(SPLITS)}")
        return self

    def sample(self, rng: Rng) -> Episode:
        """Draws amplitude, phase and then the inputs."""
        return self._batch([rng])[0]

    def episodes(self, seed: int, stream: str, numbers: Sequence[int]) -> EpisodeBatch:
        """The episodes of ``numbers``, stacked; see :meth:`TaskSource.episodes`."""
        return self._batch([Rng(seed, stream, number) for number in numbers])

    def describe(self) -> dict[str, Any]:
        """The ranges that tasks are drawn from."""
        return {"content_id": "sinusoid/1", "amplitude": AMPLITUDE, "phase": PHASE, "input": INPUT}

    def _batch(self, rngs: Sequence[Rng]) -> EpisodeBatch:
        if not rngs:
            raise ValueError("cannot stack zero episodes")
        unit = np.stack([rng.uniform(size=2 + self.shots + self.query_shots) for rng in rngs])  # [T, 2 + S + Q]
        amplitude, phase, x = (
            low + (high - low) * part
            for (low, high), part in zip(
                (AMPLITUDE, PHASE, INPUT), (unit[:, :1], unit[:, 1:2], unit[:, 2:]), strict=True
            )
        )
        y = amplitude * np.sin(x - phase)
        inputs, targets = (torch.from_numpy(part.astype(np.float32))[:, :, None] for part in (x, y))
        info = tuple(
            {"amplitude": float(a), "phase": float(p)} for a, p in zip(amplitude[:, 0], phase[:, 0], strict=True)
        )
        s = self.shots
        return EpisodeBatch(
            Examples(inputs[:, :s].contiguous(), targets[:, :s].contiguous()),
            Examples(inputs[:, s:].contiguous(), targets[:, s:].contiguous()),
            info,
        )
