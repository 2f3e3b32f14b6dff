"""Query examples of none of an episode's classes: what a learner should answer with "none of these"."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from metadist.data.samplers import ClassPool, Ints
from metadist.episode import EpisodeBatch, Examples
from metadist.errors import DataError
from metadist.seeding import Rng

OUTSIDE = -100
"""The label of an outsider: the one that torch's cross entropy leaves out of its mean."""


def outsider_rows(
    pool: ClassPool, count: int, seed: int, stream: str, numbers: Sequence[int], classes: Ints | None = None
) -> Ints:
    """Rows of ``count`` different examples for each episode, a class drawn before an example, int64 ``[T, count]``.

    Args:
        pool: the classes they are drawn from.
        count: how many for each episode.
        seed, stream, numbers: of the episodes; what is drawn here changes nothing of what they are otherwise.
        classes: of each episode, int64 ``[T, N]``, that are not to be drawn, by their numbers in ``pool``.

    Raises:
        DataError: there are not as many.
    """
    out = np.empty((len(numbers), count), dtype=np.int64)
    first, held = pool.block_rows[pool.first_block], pool.examples
    for row, number in enumerate(numbers):
        rng = Rng(seed, f"{stream}/outsiders", number)
        inside = set() if classes is None else set(classes[row].tolist())
        left = [c for c in range(len(pool)) if c not in inside]
        if int(held[left].sum()) < count:
            raise DataError(
                "evaluation.outsiders",
                f"{count} wanted, but there are {int(held[left].sum())} examples of no class of an episode",
                "ask for fewer, or name a split that holds more in tasks.outsiders_from",
            )
        drawn: list[int] = []
        while len(drawn) < count:
            c = left[rng.integer(len(left))]
            if (example := int(first[c]) + rng.integer(int(held[c]))) not in drawn:
                drawn.append(example)
        out[row] = drawn
    return out


def with_outsiders(batch: EpisodeBatch, x: Tensor) -> EpisodeBatch:
    """The episodes with outsiders ``x [T, count, ...]`` at the end of their query sets, labelled :data:`OUTSIDE`."""
    labels = torch.full(x.shape[:2], OUTSIDE, dtype=batch.query.y.dtype)
    query = Examples(torch.cat([batch.query.x, x], 1), torch.cat([batch.query.y, labels], 1))
    return EpisodeBatch(batch.support, query, batch.info)
