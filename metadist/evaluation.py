"""The honest number: mean and 95 % interval over a fixed, seeded set of episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from metadist.algorithms.base import ALSO, OUTSIDERS, PRE, STEP
from metadist.algorithms.sequence import INSTANCE
from metadist.rounds import EpisodeSize, Round

_TASKS_TOGETHER, _BYTES_TOGETHER = 25, 1 << 30


def tasks_together(parameters: int) -> int:
    """How many tasks an evaluation adapts at once: 25, or fewer where each adapts a copy of a large model.

    Args:
        parameters: numbers in the meta-parameters, of four bytes each.
    """
    return max(1, min(_TASKS_TOGETHER, _BYTES_TOGETHER // (4 * max(1, parameters))))


def evaluation_round(version: int, split: str, episodes: int, tasks_per_microbatch: int, size: EpisodeSize) -> Round:
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
        the normal 95 % interval of the mean, ``1.96 s / sqrt(n)`` with the sample deviation ``s``. Of learners
        that read sequences also ``by_instance``, ``mean`` and ``ci95`` of the accuracy when a class is shown for
        the first time, ``"1"``, the second, and so on. Of learners that adapt in steps also ``by_step``, the mean
        metrics before the first one, ``"0"``, and after each. Of the metrics that are reported beside it ``also``,
        ``mean`` and ``ci95`` of each. Where query sets hold outsiders ``outsiders``, ``mean`` and ``ci95`` of the AUROC
        with which confidence tells them from the others.
    """
    by_step = _by_step(metrics, metric)
    also = {k.removeprefix(ALSO): interval_of(v) for k, v in metrics.items() if k.startswith(ALSO)}
    by_instance = {k.removeprefix(INSTANCE): interval_of(v) for k, v in metrics.items() if k.startswith(INSTANCE)}
    return {
        "split": split,
        "episodes": len(metrics[metric]),
        "metric": metric,
        "pre_adaptation": float(metrics[PRE + metric].mean()) if PRE + metric in metrics else None,
        **interval_of(metrics[metric]),
        "batchnorm": batchnorm,
        **({"also": also} if also else {}),
        **({"outsiders": interval_of(metrics[OUTSIDERS])} if OUTSIDERS in metrics else {}),
        **({"by_instance": by_instance} if by_instance else {}),
        **({"by_step": by_step} if by_step else {}),
    }


def _by_step(metrics: Mapping[str, np.ndarray], metric: str) -> dict[str, dict[str, float]]:
    """The adaptation curve: mean loss and metric by the inner steps made; empty if they were not told of."""
    between = sorted({int(name.removeprefix(STEP).partition("/")[0]) for name in metrics if name.startswith(STEP)})
    if not between:
        return {}
    places = {0: PRE, **{k: f"{STEP}{k}/" for k in between}, between[-1] + 1: ""}
    names = dict.fromkeys(("loss", metric))
    return {
        str(k): {name: float(metrics[place + name].mean()) for name in names if place + name in metrics}
        for k, place in places.items()
    }


def interval_of(values: np.ndarray) -> dict[str, float]:
    """``mean`` and ``ci95``, half the width of the normal 95 % interval, of values ``[episodes]``."""
    n = len(values)
    ci95 = 1.96 * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return {"mean": float(values.mean()), "ci95": ci95}
