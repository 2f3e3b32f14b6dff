"""Sine waves for workers of which one is slower than the others: each takes its time over a microbatch."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metadist.episode import EpisodeBatch
from metadist.tasks.sinusoid import SinusoidTasks


class UnevenSines(SinusoidTasks):
    """The waves of :class:`SinusoidTasks`, drawn for training after a timed wait.

    Args:
        wait_s: seconds of the wait for a microbatch.
        slow_by: how many times longer one of the processes waits: the first that comes to ``mark``.
        mark: a file that does not exist yet.
        arguments: of ``SinusoidTasks``.
    """

    def __init__(self, wait_s: float, slow_by: float, mark: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._wait_s, self._slow_by, self._mark = wait_s, slow_by, Path(mark)

    def episodes(self, seed: int, stream: str, numbers: Sequence[int]) -> EpisodeBatch:
        """As there, later. Evaluations do not wait."""
        if stream == "train":
            time.sleep(self._wait_s * (self._slow_by if self._is_slow() else 1.0))
        return super().episodes(seed, stream, numbers)

    def _is_slow(self) -> bool:
        try:
            with self._mark.open("x") as mark:
                mark.write(str(os.getpid()))
        except FileExistsError:
            pass
        return self._mark.read_text() == str(os.getpid())
