"""One microbatch on every worker, by the workers of a run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

from metadist.doctor.checks import planned
from metadist.doctor.findings import Finding
from metadist.doctor.place import Subject
from metadist.errors import ClusterError, MetadistError
from metadist.experiment import Experiment
from metadist.outer.gradient import Layout
from metadist.resolve import resolve
from metadist.runtime import open_backend
from metadist.runtime.backend import Computed, Died
from metadist.server import outer_options
from metadist.worker import Lease, training_round

_SLOW = 2.0
_ROUNDS = 3
_PATIENCE = 5.0
"""How many times as long as another answer the workers' start, and their first microbatch, may take."""

_ONE_SERVER = {
    "topology": "server", "server_shards": 1, "node_sums": False, "wire": "float32", "transport": "auto",
    "max_staleness": 0, "quorum": 1.0,
}  # fmt: skip


def workers(subject: Subject) -> Iterator[Finding]:
    """Every worker starts, computes a microbatch, and takes about as long as the others."""
    if subject.experiment is None or not _fit(subject):
        return
    timing = Timing(subject.experiment, subject.deadline_s)
    try:
        yield from _timed(subject, timing)
    except MetadistError as e:
        yield Finding("workers", "wrong", f"{e.where}: {e.problem}", "a microbatch computed by each worker", e.mend)
    finally:
        timing.close()


def _fit(subject: Subject) -> bool:
    """Whether the workers find what they need; if not, another check says so."""
    try:
        if subject.on_ray and subject.experiment is not None:
            planned(subject.place, subject.experiment.config.runtime)
    except ClusterError:
        return False
    return True


def _timed(subject: Subject, timing: Timing) -> Iterator[Finding]:
    started = timing.start()
    nodes = {w: subject.name(n) if n in subject.place.nodes else "" for w, n in timing.nodes().items()}
    if started < timing.wanted:
        yield Finding(
            "workers", "wrong", f"{started} of {timing.wanted} workers have started", f"all in {timing.patience:g} s",
            "see `ray status`: others may use what they need; lower runtime.workers, or wait",
        )  # fmt: skip
    first = timing.round()
    lost = [w for w in nodes if w not in first]
    for worker in lost:
        yield Finding(
            "workers", "wrong", f"worker {worker} {timing.lost.get(worker, 'has not computed a microbatch')}",
            f"a microbatch in {timing.patience:g} s", "see what the node is busy with; raise --timeout if it compiles",
            nodes[worker],
        )  # fmt: skip
    seconds = timing.rounds(_ROUNDS)
    if slow_ones(seconds):
        # Once more before anybody is blamed: another process may have had the node for a moment.
        again = timing.rounds(2 * _ROUNDS)
        seconds = {w: min(s, again.get(w, s)) for w, s in seconds.items()}
    slow = slow_ones(seconds)
    for worker, times in slow.items():
        yield Finding(
            "workers", "warning", f"worker {worker} takes {_ms(seconds[worker])} for a microbatch",
            f"{_ms(seconds[worker] / times)}, the median: it takes {times:.1f} times as long",
            "see what else runs on the node (`top`, `nvidia-smi`), its clock and its disk, or leave it out",
            nodes.get(worker, ""),
        )  # fmt: skip
    if seconds and not slow and not lost:
        least, most = _ms(min(seconds.values())), _ms(max(seconds.values()))
        span = f"{len(seconds)} workers {least} to {most}" if len(seconds) > 1 else f"the worker {least}"
        yield Finding("workers", "ok", f"a microbatch of {timing.tasks} tasks takes {span} ({timing.device})")


def slow_ones(seconds: Mapping[int, float]) -> dict[int, float]:
    """Workers that take more than twice the median, and how many times the median it is; of two, the faster counts."""
    if not seconds:
        return {}
    median = statistics.median_low(seconds.values())
    return {w: s / median for w, s in seconds.items() if s > _SLOW * median}


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


class Timing:
    """The workers of a run, with which nothing is learned.

    Args:
        experiment: whose.
        deadline_s: seconds for a microbatch.

    Attributes:
        wanted: workers that the run asks for, or has to have.
        patience: seconds for the first microbatch, and between two workers that start.
        lost: workers that are gone, and why.
    """

    def __init__(self, experiment: Experiment, deadline_s: float) -> None:
        runtime = experiment.config.runtime.model_copy(update=_ONE_SERVER)
        with_server = Experiment(experiment.config.model_copy(update={"runtime": runtime}), code=experiment.code)
        self._experiment = resolve(with_server).experiment
        self._deadline_s, self.patience = deadline_s, _PATIENCE * deadline_s
        self._backend: Any = None
        self._number = 0
        self.lost: dict[int, str] = {}
        self.tasks = int(self._experiment.config.outer.tasks_per_microbatch)
        self.wanted, self.device = 1, "cpu"

    def start(self) -> int:
        """Starts the workers; how many have."""
        learner = self._experiment.learner()
        initial = learner.initial_meta_params()
        layout = Layout.of(initial)
        self._backend = open_backend(self._experiment)
        snapshot = {"version": 0, "weights": layout.flatten(initial).numpy(), "outer_state": {}}
        self._backend.start(snapshot, outer_options(self._experiment, learner, layout))
        told = self._backend.describe()
        self.device = told["device"]
        given = self._experiment.config.runtime.workers
        self.wanted = getattr(given, "min", told["workers"]) if told["type"] == "ray" else 1
        there, since = -1, time.monotonic()
        while there < told["workers"] and time.monotonic() - since < self.patience:
            if len(self._backend.workers()) != there:
                there, since = len(self._backend.workers()), time.monotonic()
            if there >= self.wanted and time.monotonic() - since > self._deadline_s / 10:
                break  # of a range, those that find no room need not come
            if there < told["workers"]:
                self._backend.wait(0.5)
        return there

    def nodes(self) -> dict[int, str]:
        """The workers that are ready, and the nodes they are on; empty names where there are none."""
        nodes: dict[int, str] = getattr(self._backend, "nodes", dict)()
        return {w: nodes.get(w, "") for w in self._backend.workers()}

    def round(self) -> dict[int, float]:
        """Seconds in which each worker has computed the first microbatch, all at once; without those that have not."""
        asked = {}
        for worker in self._backend.idle():
            self._number += 1
            asked[self._number] = worker
            self._backend.lease(worker, Lease(self._number, training_round(self._experiment, 0), 0, 1))
        seconds: dict[int, float] = {}
        end = time.monotonic() + self.patience
        while len(seconds) + len(set(asked.values()) & set(self.lost)) < len(asked) and time.monotonic() < end:
            for event in self._backend.wait(0.5):
                if isinstance(event, Computed):
                    report = event.report
                    self._backend.drop(report.lease)
                    if report.lease.number in asked:
                        seconds[event.worker] = report.compute_s + report.data_wait_s
                elif isinstance(event, Died):
                    self.lost[event.worker] = f"is gone ({event.reason})"
        return seconds

    def rounds(self, count: int) -> dict[int, float]:
        """The least of several rounds."""
        best: dict[int, float] = {}
        for _ in range(count):
            for worker, seconds in self.round().items():
                best[worker] = min(seconds, best.get(worker, seconds))
        return best

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()
        self._experiment.close()
