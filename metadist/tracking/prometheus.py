"""The figures of a run among Ray's own metrics, from where Prometheus collects them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metadist.tracking.base import PARTS, RunInfo, Tracker

PREFIX = "ray_"
"""What Ray puts before every name it exports."""

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "metadist_version": ("Meta-updates made", ()),
    "metadist_total_steps": ("Meta-updates that the run is to make", ()),
    "metadist_loss": ("Mean query loss after adaptation", ()),
    "metadist_metric": ("The task's metric, before or after adaptation", ("metric", "when")),
    "metadist_evaluation": ("The task's metric in an evaluation", ("metric", "split", "when")),
    "metadist_evaluation_ci95": ("Half the width of the 95 % interval of an evaluation", ("metric", "split")),
    "metadist_grad_norm": ("Norm of the mean meta-gradient", ()),
    "metadist_tasks_per_second": ("Tasks of the last step, over its time", ()),
    "metadist_step_seconds": ("Time of the last step", ()),
    "metadist_step_part_seconds": ("Parts that the time of the last step is made of", ("part",)),
    "metadist_staleness": ("Mean versions by which gradients lagged behind their update", ()),
    "metadist_dropped_gradients": ("Gradients too old for the last update", ()),
    "metadist_workers": ("Workers that are ready", ()),
    "metadist_worker_utilisation": ("Share of the last step that a worker computed", ("worker",)),
    "metadist_worker_memory_bytes": ("Growth of a worker's memory so far, the most of all", ()),
    "metadist_gpu_utilisation": ("Share of the time in which a worker's GPU computed", ("worker",)),
    "metadist_gpu_memory_bytes": ("Most GPU memory that a worker has allocated so far", ("worker",)),
    "metadist_restarts": ("Processes that were replaced so far", ("kind",)),
    "metadist_releases": ("Leases that were given again so far", ()),
}
"""What is told, by the name without :data:`PREFIX`: what it is, and its tags besides ``run``, the run's name."""

_SINGLE = {
    "loss": ("metadist_loss", 1.0),
    "grad_norm": ("metadist_grad_norm", 1.0),
    "tasks_per_s": ("metadist_tasks_per_second", 1.0),
    "step_s": ("metadist_step_seconds", 1.0),
    "staleness": ("metadist_staleness", 1.0),
    "dropped": ("metadist_dropped_gradients", 1.0),
    "workers": ("metadist_workers", 1.0),
    "worker_memory_mb": ("metadist_worker_memory_bytes", 1e6),
    "releases": ("metadist_releases", 1.0),
}


class PrometheusTracker(Tracker):
    """Tells Ray's metrics agent of every step; its own endpoint on each node then has the figures.

    All are gauges of the driver's process, tagged ``run`` with the run's name. A worker that is gone is told of as
    idle, since a gauge stays at its last value.
    """

    def start(self, run: RunInfo) -> None:
        """Makes the gauges.

        Raises:
            ImportError: Ray is not installed.
        """
        from ray.util.metrics import Gauge

        self._metric = run.metric
        self._workers: set[str] = set()
        self._gauges = {
            name: Gauge(name, description=text, tag_keys=("run", *tags)) for name, (text, tags) in GAUGES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run.name})
        self._set("metadist_total_steps", run.total_steps)
        self._set("metadist_version", run.start_version)

    def log(self, version: int, metrics: Mapping[str, Any]) -> None:
        self._set("metadist_version", version)
        for name, (gauge, factor) in _SINGLE.items():
            self._set(gauge, metrics.get(name), factor)
        for part in PARTS:
            self._set("metadist_step_part_seconds", metrics.get(f"{part}_s"), part=part)
        for when, name in (("before", f"pre_adaptation_{self._metric}"), ("after", self._metric)):
            self._set("metadist_metric", metrics.get(name), metric=self._metric, when=when)
        for kind, count in (metrics.get("restarts") or {}).items():
            self._set("metadist_restarts", count, kind=kind)
        self._log_workers(metrics.get("utilisation") or {}, metrics.get("gpu") or {})

    def log_evaluation(self, version: int, result: Mapping[str, Any]) -> None:
        metric, split = str(result.get("metric", self._metric)), str(result.get("split", "test"))
        for when, name in (("before", "pre_adaptation"), ("after", "mean")):
            self._set("metadist_evaluation", result.get(name), metric=metric, split=split, when=when)
        self._set("metadist_evaluation_ci95", result.get("ci95"), metric=metric, split=split)

    def rewind(self, version: int) -> None:
        self._set("metadist_version", version)

    def _log_workers(self, used: Mapping[str, float], gpus: Mapping[str, Mapping[str, float]]) -> None:
        for worker in self._workers - set(used):
            self._set("metadist_worker_utilisation", 0.0, worker=worker)
        self._workers |= set(used)
        for worker, share in used.items():
            self._set("metadist_worker_utilisation", share, worker=worker)
        for worker, told in gpus.items():
            self._set("metadist_gpu_utilisation", told.get("utilisation"), worker=worker)
            self._set("metadist_gpu_memory_bytes", told.get("memory_mb"), 1e6, worker=worker)

    def _set(self, name: str, value: Any, factor: float = 1.0, **tags: str) -> None:
        if isinstance(value, (int, float)):
            self._gauges[name].set(factor * value, tags=tags)
