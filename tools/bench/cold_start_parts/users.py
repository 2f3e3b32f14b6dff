"""Held-out users with what is known of them, and how a method's answers are judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from metadist import Examples
from metadist.algorithms.losses import ndcg
from metadist.tasks.ratings import RatingTasks


@dataclass(frozen=True)
class User:
    """A user's first ratings and some that came later.

    Args:
        name: as in the set.
        known: rows ``[most, columns]`` and ratings ``[most, 1]``, in the order of time.
        later: the same of what is to be foretold.
    """

    name: str
    known: Examples
    later: Examples

    def first(self, shots: int) -> Examples:
        """What is known after ``shots`` ratings."""
        return Examples(self.known.x[:shots], self.known.y[:shots])


def users_of(path: Path, split: str, most: int, later: int) -> list[User]:
    """Every user of a split with ratings enough: ``most`` that may be known, and the ``later`` ones after them.

    What is foretold is the same whatever the number of ratings that are known.
    """
    tasks = RatingTasks(path, most, later, split)
    episodes = tasks.episodes(0, "cold start", range(len(tasks.users)))
    return [User(e.info["user"], e.support, e.query) for e in episodes]


def everything(path: Path, split: str) -> Examples:
    """All ratings of all users of a split."""
    tasks = RatingTasks(path, 1, 1, split)
    pairs = [tasks.ratings_of(int(user)) for user in tasks.users]
    rows, values = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    return Examples(torch.from_numpy(rows), torch.from_numpy(values[:, None]))


def errors(users: list[User], answers: list[torch.Tensor], scale: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Mean absolute error and nDCG of each user; answers beyond the scale are taken to be at its end."""
    off, ordered = [], []
    for user, answer in zip(users, answers, strict=True):
        answer = answer.reshape(-1, 1)
        off.append(float((answer.clamp(*scale) - user.later.y).abs().mean()))
        ordered.append(float(ndcg(answer, user.later.y)))
    return np.array(off), np.array(ordered)
