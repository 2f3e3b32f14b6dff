"""Cold start: from a person's first ratings, those to come (Lee et al. 2019, MeLU)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metadist.data.samplers import Ints
from metadist.data.shards import ShardSet
from metadist.episode import PADDING, Episode, EpisodeBatch, Examples
from metadist.errors import DataError
from metadist.seeding import Rng
from metadist.tasks.packed import PackedTasks, check_sizes


class RatingTasks(PackedTasks):
    """A task is a user: the support set is the past, the query set the future.

    An input is a row of whole numbers: of the item, of its features and of the user's features, as many columns as the
    richest has, the rest :data:`~metadist.episode.PADDING`. The numbers of different things differ, so that one table
    of vectors holds them all.

    In training a user is drawn, and a moment of theirs: ``shots`` ratings before it, ``query_shots`` after it. In other
    splits episode *e* is user *e* (from the first again after the last), at their beginning: ``shots`` ratings are all
    that is known of them. A split's users are those with ratings enough.

    Args:
        path: directory of the shard set (``metadist data pack ratings``).
        shots: ratings of a user that are known.
        query_shots: ratings that come next.
        split: ``train``, ``validation`` or ``test``; ``"train+validation"`` joins two.
        train_split: the split in which users and moments are drawn.
        items: whether the item itself has a number, beside its features.
        least: ratings of a user at the least, in place of ``shots + query_shots``: with the most shots of several
            evaluations, all are of the same users.

    Raises:
        DataError: if the set is missing, damaged or holds no ratings, lacks the split, or no user has ratings enough.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shots: int,
        query_shots: int,
        split: str = "train",
        train_split: str = "train",
        items: bool = True,
        least: int | None = None,
    ) -> None:
        check_sizes(shots=shots, query_shots=query_shots)
        self.path, self.shots, self.query_shots = os.fspath(path), shots, query_shots
        self.train_split, self.items = train_split, items
        self.least = max(least or 0, shots + query_shots)
        self._shards = ShardSet(path)
        if self._shards.manifest.notes.get("kind") != "ratings":
            raise DataError(self.path, "holds no ratings", "choose a set that `metadist data pack ratings` has made")
        self._table = Table.of(self._shards.manifest.notes, self.path, items)
        self._users: dict[int, tuple[Ints, NDArray[np.float32]]] = {}
        self._use(split)

    @property
    def vocabulary(self) -> int:
        """Numbers that stand in a row."""
        return self._table.vocabulary

    def _use(self, split: str) -> None:
        self.split_name = split
        held = np.bincount(self._shards.index["class"], self._shards.index["n"])
        users = self._shards.classes_of(split)
        self.users = users[held[users] >= self.least]
        if not len(self.users):
            most = int(held[users].max(initial=0))
            raise DataError(
                "tasks.shots + tasks.query_shots",
                f"{self.least} ratings of a user, but the most that one of split {split!r} has is {most}",
                f"ask for at most {most}",
            )

    def sample(self, rng: Rng) -> Episode:
        """One episode; of ``Rng(seed, stream, e)`` it is episode ``e`` of :meth:`episodes`.

        Returns:
            support.x int64 ``[shots, columns]``, support.y float32 ``[shots, 1]`` in the set's own scale, in the order
            of time; the query likewise with ``query_shots``. ``info`` has ``user`` and ``first``, which of the user's
            ratings the first one is.
        """
        if self.split_name == self.train_split:
            user = int(self.users[rng.integer(len(self.users))])
            rows, values = self.ratings_of(user)
            first = rng.integer(len(values) - self.shots - self.query_shots + 1)
        else:
            user, first = int(self.users[rng.index % len(self.users)]), 0
            rows, values = self.ratings_of(user)
        x, y = torch.from_numpy(rows[first:]), torch.from_numpy(values[first:, None])
        middle, end = self.shots, self.shots + self.query_shots
        info = {"user": self._shards.manifest.classes[user], "first": first}
        return Episode(Examples(x[:middle], y[:middle]), Examples(x[middle:end], y[middle:end]), info)

    def episodes(self, seed: int, stream: str, numbers: Sequence[int]) -> EpisodeBatch:
        """The episodes of ``numbers``, in that order; see :meth:`sample`."""
        return EpisodeBatch.stack([self.sample(Rng(seed, stream, int(e))) for e in numbers])

    def ratings_of(self, user: int) -> tuple[Ints, NDArray[np.float32]]:
        """A user's rows and ratings, ``[n, columns]`` and ``[n]``, in the order of time."""
        if user not in self._users:
            index = self._shards.index["class"]
            blocks = range(int(np.searchsorted(index, user)), int(np.searchsorted(index, user, side="right")))
            told = [self._parsed(part, b) for b in blocks for part in self._shards.parts(b)]
            items = np.array([item for item, _ in told], dtype=np.int64)
            rows = self._table.rows(items, user)
            self._users[user] = rows, np.array([rating for _, rating in told], dtype=np.float32)
        return self._users[user]

    def _parsed(self, part: bytes, b: int) -> tuple[int, float]:
        try:
            told = json.loads(part)
            item, rating = int(told["item"]), float(told["rating"])
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(self._shards.where(b), f"holds what is no rating ({e})", "pack the set again") from None
        if not 0 <= item < len(self._table.of_items):
            unknown = f"rates item {item}, which the set does not name"
            raise DataError(self._shards.where(b), unknown, "pack the set again")
        return item, rating

    def __getstate__(self) -> dict[str, Any]:
        """Another process reads the ratings itself."""
        return {**self.__dict__, "_users": {}}

    def describe(self) -> dict[str, Any]:
        """What a run should remember of its data."""
        m = self._shards.manifest
        return {
            "content_id": m.content_id,
            "name": m.name,
            "path": self.path,
            "split": self.split_name,
            "users": len(self.users),
            "shots": self.shots,
            "query_shots": self.query_shots,
            "vocabulary": self.vocabulary,
            "licence": m.licence,
        }


class Table:
    """The numbers of items, of their features and of users' features.

    Args:
        of_items: numbers of each item, itself first, int64 ``[items, columns]``.
        of_users: numbers of each user's features, int64 ``[users, columns]``; None: they have none.
        vocabulary: one more than the largest.
    """

    def __init__(self, of_items: Ints, of_users: Ints | None, vocabulary: int) -> None:
        self.of_items, self.of_users, self.vocabulary = of_items, of_users, vocabulary

    @classmethod
    def of(cls, notes: Mapping[str, Any], where: str, items: bool) -> Table:
        """From what a shard set notes of its items and users.

        Raises:
            DataError: the notes are not those of a set of ratings.
        """
        try:
            count = len(notes["items"])
            features, people = notes.get("item_features"), notes.get("user_features")
            used = 1
            of_items, used = (np.arange(used, used + count)[:, None], used + count) if items else (None, used)
            if features:
                named, used = _numbered(features, count, used)
                of_items = named if of_items is None else np.concatenate([of_items, named], 1)
            if of_items is None:
                raise DataError("tasks.items", "is false, and the set has no features of items", "write true")
            of_users = None
            if people:
                of_users, used = _numbered(people, len(people["values"]), used)
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(where, f"does not name its items as it should ({e!r})", "pack the set again") from None
        return cls(of_items, of_users, used)

    def rows(self, items: Ints, user: int) -> Ints:
        """The rows of ``items``, rated by one user, int64 ``[n, columns]``."""
        of_items = self.of_items[items]
        if self.of_users is None:
            return of_items
        return np.concatenate([of_items, np.broadcast_to(self.of_users[user], (len(items), self.of_users.shape[1]))], 1)


def _numbered(features: Mapping[str, Any], count: int, used: int) -> tuple[Ints, int]:
    """A row of numbers from ``used`` on for each of ``count`` things, and the first number that is free then."""
    values = features["values"]
    if len(values) != count:
        raise ValueError(f"features of {len(values)} for {count}")
    out = np.full((count, max((len(v) for v in values), default=0)), PADDING, dtype=np.int64)
    for row, own in zip(out, values, strict=True):
        if any(not 0 <= v < len(features["names"]) for v in own):
            raise ValueError(f"a feature that has no name in {own}")
        row[: len(own)] = np.asarray(own, dtype=np.int64) + used
    return out, used + len(features["names"])
