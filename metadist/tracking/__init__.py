"""Who is told of a run's progress: files, the terminal, Weights & Biases."""

from metadist.tracking.base import RunInfo, Tracker, Trackers
from metadist.tracking.console import ConsoleTracker
from metadist.tracking.jsonl import JsonlTracker
from metadist.tracking.wandb import WandbTracker

__all__ = ["ConsoleTracker", "JsonlTracker", "RunInfo", "Tracker", "Trackers", "WandbTracker"]
