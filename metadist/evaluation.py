"""The honest number: mean and 95 % interval over a fixed, seeded set of episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from metadist.algorithms.base import PRE
from metadist.experiment import EpisodeSize
from metadist.worker import Round


def evaluation_round(
    version: int, split: str, episodes: int, tasks_per_microbatch: int, size: EpisodeSize
) -> Round:
    """The evaluation of one version on one split: the same episodes for every version and worker count."""
    return Round("evaluate", version, split, f"evaluation/{split}", 0, episodes, tasks_per_microbatch, size)


def summarise(metrics: Mapping[str, np.ndarray], metric: str, split: str, batchnorm: str) -> dict[str, Any]:
    """The result of an evaluation.

    Args:
        metrics: per-episode arrays, ``[episodes]`` each, in the order of the episodes.
        metric: which of them is reported.
        split: where the episodes came from.
        batchnorm: ``transductive``, ``none`` or another mode; it moves results by points.

    Returns:
        ``split, episodes, metric, pre_adaptation, mean, ci95, batchnorm``; ``ci95`` is half the width of
        the normal 95 % interval of the mean, ``1.96 s / sqrt(n)`` with the sample deviation ``s``.
    """
    values = metrics[metric]
    n = len(values)
    ci95 = 1.96 * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return {
        "split": split,
        "episodes": n,
        "metric": metric,
        "pre_adaptation": float(metrics[PRE + metric].mean()) if PRE + metric in metrics else None,
        "mean": float(values.mean()),
        "ci95": ci95,
        "batchnorm": batchnorm,
    }
