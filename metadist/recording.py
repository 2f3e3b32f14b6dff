"""What is written down of each step: the trackers' line, the log of updates, and alerts."""

from __future__ import annotations

from typing import Any

from metadist.config import Config
from metadist.history import UpdateLog
from metadist.runtime.controller import RoundResult, means
from metadist.totals import Totals
from metadist.tracking import Trackers
from metadist.tracking.watch import Watch


class Recorder:
    """Writes down the steps of a run.

    Args:
        config: the run's.
        trackers: who are told.

    ``memory`` and ``programs`` are the most that a worker was seen to take (bytes) and to have traced or compiled.
    """

    def __init__(self, config: Config, trackers: Trackers) -> None:
        self._config, self._trackers, self._watch = config, trackers, Watch()
        self.memory, self.programs = 0, 0

    def rewind(self) -> None:
        """Steps will come again."""
        self._watch.rewind()

    def step(
        self,
        version: int,
        result: RoundResult,
        stats: dict[str, float],
        server_s: float,
        totals: Totals,
        log: UpdateLog | None,
        standing: dict[str, Any],
    ) -> None:
        """Writes a step down.

        Args:
            version: that it made.
            result: the round it was made from.
            stats: of the update.
            server_s: seconds that the update took.
            totals: of the run, to which the step is added.
            log: of a run whose updates do not wait for all.
            standing: what else belongs on the line.
        """
        tasks = len(result.metrics["loss"])
        step_s = max(result.seconds + server_s, 1e-9)
        totals.tasks_seen += tasks
        totals.train_s += step_s
        self.memory = max(self.memory, result.memory)
        self._note_programs(version, result.programs)
        line: dict[str, Any] = {
            **means(result.metrics), **stats, "tasks_per_s": tasks / step_s, "step_s": step_s,
            "data_wait_s": result.data_wait_s, "server_s": server_s, **result.spent.budget(result.seconds, server_s),
            **({"gpu": {str(k): told for k, told in result.gpus.items()}} if result.gpus else {}),
            **self._lags(result), "worker_memory_mb": self.memory / 1e6,
            "worker_s": {str(k): v for k, v in result.worker_s.items()}, **standing,
        }  # fmt: skip
        if log is not None:
            log.append(
                version, result.round.microbatches if result.left_out else len(result.applied),
                result.applied, result.dropped, result.left_out,
            )  # fmt: skip
        self._trackers.log(version, line)
        for alert in self._watch.step(line):
            self._trackers.alert(alert.title, f"step {version}: {alert.text}")

    def _lags(self, result: RoundResult) -> dict[str, float]:
        """How far gradients lagged behind the update they were used in, and what was not used."""
        lags = result.staleness or [0]
        found: dict[str, float] = {"staleness": sum(lags) / len(lags)}
        if self._config.runtime.max_staleness:
            found |= {"staleness_max": max(lags), "dropped": len(result.dropped)}
        if self._config.runtime.quorum < 1:
            found["left_out"] = len(result.left_out)
        return found

    def _note_programs(self, version: int, programs: int) -> None:
        """Says so if a worker had to trace or compile again in the middle of the run."""
        if self.programs and programs > self.programs:
            made = "compiled" if self._config.engine.compile is True else "traced"
            self._trackers.message(
                f"step {version}: the meta-gradient was {made} again, for other shapes or another phase of the learner"
            )
        self.programs = max(self.programs, programs)
