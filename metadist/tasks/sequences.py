"""Episodes as sequences: in which order examples are shown, and what their classes are called.

Both choices are made after an episode is drawn, each by random numbers of its own, so that the same
classes and examples turn up whatever the order and the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from metadist.episode import EpisodeBatch, Examples
from metadist.errors import ConfigError
from metadist.seeding import Rng

Order = Literal["by_class", "within_sets", "shuffled"]
Labels = Literal["index", "letters"]
Number = tuple[int, str, int]
"""Seed, stream and number of an episode."""

ORDERS, LABELS = ("by_class", "within_sets", "shuffled"), ("index", "letters")

LETTERS = 5
"""Letters of the alphabet, ``a`` to ``e``, and of a string (Santoro et al. 2016, section 4.1)."""


def check_choices(order: str, labels: str) -> None:
    """Refuses an order or labels that are not there.

    Raises:
        ConfigError: naming what there is.
    """
    for name, value, known in (("order", order, ORDERS), ("labels", labels, LABELS)):
        if value not in known:
            raise ConfigError(f"tasks.{name}", f"is {value!r}", f"choose one of {', '.join(known)}")


def arrange(batch: EpisodeBatch, numbers: Sequence[Number], order: str, labels: str) -> EpisodeBatch:
    """The same episodes in the order and with the labels asked for.

    Args:
        batch: T episodes as they are drawn, class by class, labels int64 ``[T, examples]``.
        numbers: each one's seed, stream and number, of which order and labels are functions.
        order: ``by_class`` leaves them; ``within_sets`` permutes support and query sets, each in itself;
            ``shuffled`` permutes all examples together, of which the first fill the support set, so that how often a
            class is in it is a matter of chance.
        labels: ``index`` leaves them; ``letters`` makes each a string of five letters, int64 ``[T, examples, 5]`` of
            0 to 4, drawn anew for every class of every episode.
    """
    support, query = batch.support, batch.query
    if labels == "letters":
        names = torch.from_numpy(np.stack([_strings(int(support.y.max()) + 1, n) for n in numbers]))
        support, query = (Examples(s.x, _of_each(names, s.y)) for s in (support, query))
    if order == "by_class":
        return EpisodeBatch(support, query, batch.info)
    parts = [support.y.shape[1], query.y.shape[1]]
    places = torch.from_numpy(np.stack([_places(parts, order, n) for n in numbers]))
    x, y = (_of_each(torch.cat(both, 1), places).split(parts, 1) for both in zip(support, query, strict=True))
    return EpisodeBatch(Examples(x[0], y[0]), Examples(x[1], y[1]), batch.info)


def _strings(ways: int, number: Number) -> np.ndarray:
    """Distinct strings of letters, one a class, int64 ``[ways, LETTERS]``."""
    seed, stream, episode = number
    chosen = Rng(seed, f"{stream}/labels", episode).choice(LETTERS**LETTERS, ways)
    return chosen[:, None] // LETTERS ** np.arange(LETTERS) % LETTERS


def _places(parts: list[int], order: str, number: Number) -> np.ndarray:
    """Which example, of support and query one after the other, comes at each place, int64 ``[examples]``."""
    seed, stream, episode = number
    words = Rng(seed, f"{stream}/order", episode).raw(sum(parts))
    if order == "shuffled":
        return np.argsort(words, kind="stable")  # sorting random words shuffles
    apart = (np.argsort(w, kind="stable") for w in np.split(words, parts[:1]))
    return np.concatenate([a + start for a, start in zip(apart, (0, parts[0]), strict=True)])


def _of_each(values: Tensor, which: Tensor) -> Tensor:
    """Rows ``which [T, n]`` of each of ``values [T, rows, ...]``."""
    return values[torch.arange(len(which))[:, None], which]
