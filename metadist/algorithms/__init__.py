"""The learners: each says how meta-parameters adapt to a task, and in which direction they improve."""

from __future__ import annotations

from metadist.algorithms.base import Algorithm, TaskResults
from metadist.algorithms.losses import Objective, resolve_objective
from metadist.algorithms.maml import MAML

BUILT_IN: dict[str, type[Algorithm]] = {"maml": MAML}

__all__ = ["BUILT_IN", "MAML", "Algorithm", "Objective", "TaskResults", "resolve_objective"]
