"""Who is told of a run's progress: files, the terminal, Weights & Biases, Prometheus."""

from metadist.tracking.base import RunInfo, ShownEpisode, Tracker, Trackers
from metadist.tracking.console import ConsoleTracker
from metadist.tracking.jsonl import JsonlTracker
from metadist.tracking.prometheus import PrometheusTracker
from metadist.tracking.wandb import WandbTracker

__all__ = [
    "ConsoleTracker", "JsonlTracker", "PrometheusTracker", "RunInfo", "ShownEpisode", "Tracker", "Trackers",
    "WandbTracker",
]  # fmt: skip
