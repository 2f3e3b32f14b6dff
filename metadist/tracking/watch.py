"""What a person wants to be woken for: a run that diverges, or whose workers starve."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

WINDOW = 100
"""Steps that are looked at together."""

STARVED = 0.5
"""The share of the time beyond which workers that wait are told of."""


@dataclass(frozen=True)
class Alert:
    """Something that needs a person.

    Args:
        title: a few words, the same each time.
        text: what was seen and what can be done, in a line.
    """

    title: str
    text: str


class Watch:
    """Looks at the steps of a run, and raises an alert of a kind no more often than every ``again_s`` seconds.

    A run diverges where the mean loss of the last :data:`WINDOW` steps is above the best such mean by more than half of
    what had been gained, and by more than that best. Workers starve where they wait for data, or for work, for more
    than half of such a window.

    Args:
        again_s: seconds for which an alert is not repeated.
        clock: seconds, growing.
    """

    def __init__(self, again_s: float = 1800.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._again_s, self._clock = again_s, clock
        self._raised: dict[str, float] = {}
        self.rewind()

    def rewind(self) -> None:
        """The run goes back to an earlier step."""
        self._steps: deque[Mapping[str, Any]] = deque(maxlen=WINDOW)
        self._first: float | None = None
        self._best = math.inf

    def step(self, metrics: Mapping[str, Any]) -> list[Alert]:
        """Takes note of one step; the alerts that are due.

        Args:
            metrics: as of :meth:`metadist.tracking.Tracker.log`.
        """
        self._steps.append(metrics)
        if len(self._steps) < WINDOW:
            return []
        found = [self._diverged(), *self._starved()]
        return [alert for alert in found if alert is not None and self.due(alert.title)]

    def due(self, title: str) -> bool:
        """Whether an alert of this title may be raised now; it is taken to be."""
        now, before = self._clock(), self._raised.get(title)
        if before is not None and now - before < self._again_s:
            return False
        self._raised[title] = now
        return True

    def _sum(self, name: str) -> float:
        return math.fsum(float(m.get(name) or 0.0) for m in self._steps)

    def _diverged(self) -> Alert | None:
        loss = self._sum("loss") / WINDOW
        self._first = loss if self._first is None else self._first
        self._best = min(self._best, loss)
        if loss - self._best <= max((self._first - self._best) / 2, abs(self._best)):
            return None
        return Alert(
            "diverging",
            f"the mean loss of the last {WINDOW} steps is {loss:.4g}, and was {self._best:.4g} at its best; lower "
            "outer.lr or algorithm.inner_lr, or set outer.clip_norm",
        )

    def _starved(self) -> list[Alert]:
        step_s = self._sum("step_s")
        if step_s <= 0:
            return []
        mend = {
            "data": "keep the shards nearer or in memory (tasks.resident), or take tasks.sampler: {type: window}",
            "wait": "take fewer workers, or smaller microbatches (outer.tasks_per_microbatch)",
        }
        words = {"data": "data", "wait": "work"}
        shares = {part: self._sum(f"{part}_s") / step_s for part in words}
        return [
            Alert(
                f"workers wait for {words[part]}",
                f"in the last {WINDOW} steps they did for {share:.0%} of the time; {mend[part]}",
            )
            for part, share in shares.items()
            if share > STARVED
        ]
