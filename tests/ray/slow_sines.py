"""Sine waves that take their time where a variable of the environment says so."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from metadist.episode import EpisodeBatch
from metadist.tasks.sinusoid import SinusoidTasks


class SlowSines(SinusoidTasks):
    def episodes(self, seed: int, stream: str, numbers: Sequence[int]) -> EpisodeBatch:
        time.sleep(float(os.environ.get("SLOW_S", "0.02")))
        return super().episodes(seed, stream, numbers)
