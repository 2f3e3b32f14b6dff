"""Where tasks come from: the contract, and the sources that come with the package."""

from metadist.tasks.base import SPLITS, TaskSource

__all__ = ["SPLITS", "TaskSource"]
