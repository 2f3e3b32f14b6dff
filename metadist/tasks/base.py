"""Where tasks come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metadist.episode import Episode, EpisodeBatch
from metadist.seeding import Rng

SPLITS = ("train", "validation", "test")


class TaskSource:
    """A distribution of tasks. A source of your own needs :meth:`sample` alone.

    Episode *e* of a split is a pure function of (seed, split, e): whoever asks for it, in whatever
    order, gets the same one. A source must therefore take every random choice from the ``rng`` it is
    handed, and return tensors of the same shapes each time.
    """

    def sample(self, rng: Rng) -> Episode:
        """Draws one task with ``rng`` and one episode of it."""
        raise TypeError(f"{type(self).__name__} must define sample(self, rng) -> Episode")

    def split(self, name: str) -> TaskSource:
        """The source of one split (``train``, ``validation`` or ``test``); by default all are one."""
        return self

    def episodes(self, seed: int, stream: str, numbers: Sequence[int]) -> EpisodeBatch:
        """The episodes of ``numbers``, stacked, in that order.

        Args:
            seed: the run's seed.
            stream: which sequence of episodes, e.g. ``train`` or ``evaluation/test``.
            numbers: numbers of episodes in that sequence, each at least 0.
        """
        return EpisodeBatch.stack([self.sample(Rng(seed, stream, e)) for e in numbers])

    def describe(self) -> dict[str, Any]:
        """What to keep in a run about the data, e.g. its ``content_id``, ``ways`` and numbers of classes."""
        return {}

    def close(self) -> None:
        """Lets go of files and threads."""
