"""Few-shot classification of sentences over a shard set of texts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metadist.data.samplers import Ints, UniformSampler
from metadist.data.shards import ShardSet
from metadist.data.tokens import Tokens
from metadist.episode import PADDING, Episode, EpisodeBatch, Examples
from metadist.errors import DataError
from metadist.seeding import Rng
from metadist.tasks.outsiders import outsider_rows, with_outsiders
from metadist.tasks.packed import PackedTasks, check_sizes
from metadist.tasks.sequences import Labels, Order, arrange, check_choices


class TokenStore:
    """The tokens of a set's texts, each block read when it is first asked for and kept."""

    def __init__(self, shards: ShardSet, tokens: Tokens) -> None:
        self.shards, self.tokens = shards, tokens
        self._reset()

    def _reset(self) -> None:
        # Pages that are never written take no memory.
        self._held = np.zeros((int(self.shards.rows[-1]), self.tokens.length), dtype=np.int32)
        self._read = np.zeros(len(self.shards.index), dtype=bool)

    def __getstate__(self) -> dict[str, Any]:
        """Another process reads the set itself."""
        return {"shards": self.shards, "tokens": self.tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def gather(self, rows: Ints) -> NDArray[np.int64]:
        """Tokens of texts by their rows, int64 ``[..., length]``."""
        blocks = np.unique(np.searchsorted(self.shards.rows, rows.ravel(), side="right") - 1)
        for b in blocks[~self._read[blocks]].tolist():
            a, z = self.shards.rows[b], self.shards.rows[b + 1]
            self._held[a:z] = self.tokens(self.shards.texts(b))
            self._read[b] = True
        return self._held[rows].astype(np.int64)


class TextTasks(PackedTasks):
    """N-way K-shot tasks over the classes of a shard set of texts.

    Args:
        path: directory of the shard set (``metadist data pack csv``).
        ways: classes of a task, N.
        shots: support examples of a class, K.
        query_shots: query examples of a class.
        split: ``train``, ``validation``, ``test`` or another of the set; ``"train+validation"`` joins two.
        tokens, length, vocabulary: how texts are read, see :class:`~metadist.data.tokens.Tokens`.
        renamed: chance that a word is another one throughout an episode of ``split``; the other splits have their own.
        order, labels: see :func:`~metadist.tasks.sequences.arrange`.
        outsiders: query examples that belong to none of a task's classes, labelled
            :data:`~metadist.tasks.outsiders.OUTSIDE`.
        outsiders_from: the split they are drawn from; None: the other classes of ``split``.

    Raises:
        DataError: if the set is missing, damaged or holds no texts, lacks the split, or is too small for the ways and
            shots asked for.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        ways: int,
        shots: int,
        query_shots: int,
        split: str = "train",
        tokens: Literal["words", "subwords", "bytes"] = "words",
        length: int = 32,
        vocabulary: int = 8192,
        renamed: float = 0.0,
        order: Order = "by_class",
        labels: Labels = "index",
        outsiders: int = 0,
        outsiders_from: str | None = None,
    ) -> None:
        check_choices(order, labels)
        if outsiders and labels != "index":
            raise DataError("evaluation.outsiders", "have no name among labels of letters", "use tasks.labels: index")
        check_sizes(ways=ways, shots=shots, query_shots=query_shots)
        self.path, self.order, self.labels = os.fspath(path), order, labels
        self.ways, self.shots, self.query_shots = ways, shots, query_shots
        self.outsiders, self.outsiders_from = outsiders, outsiders_from
        self.tokens = Tokens(tokens, length, vocabulary)
        self.renamed, self._renamed_split = renamed, split
        self._shards = ShardSet(path)
        if self._shards.manifest.field.encoding != "utf-8":
            raise DataError(self.path, "holds pictures, not texts", "use tasks.type: shards, or choose a set of texts")
        self._store = TokenStore(self._shards, self.tokens)
        self._use(split)

    @property
    def vocabulary(self) -> int:
        """Numbers a token may have."""
        return self.tokens.vocabulary

    def _use(self, split: str) -> None:
        self.split_name = split
        pool = self._shards.pool(split)
        if self.ways > len(pool):
            found = f"{self.ways} ways, but split {split!r} has {len(pool)} classes"
            raise DataError("tasks.ways", found, f"ask for at most {len(pool)}")
        self.sampler = UniformSampler(pool, self.ways, self.shots + self.query_shots, False)
        self._strangers = None if self.outsiders_from is None else self._shards.pool(self.outsiders_from)

    def sample(self, rng: Rng) -> Episode:
        """One episode; of ``Rng(seed, stream, e)`` it is episode ``e`` of :meth:`episodes`."""
        return self.episodes(rng.seed, rng.stream, [rng.index])[0]

    def episodes(self, seed: int, stream: str, numbers: Sequence[int]) -> EpisodeBatch:
        """The episodes of ``numbers``, in that order, whatever they are.

        Returns:
            support.x int64 ``[T, ways * shots, length]``, tokens of :class:`~metadist.data.tokens.Tokens`, support.y
            int64 ``[T, ways * shots]`` in 0..ways-1, all of class 0 first unless another order is asked for; the query
            likewise with ``query_shots``, and outsiders at its end. ``info`` of each episode has ``classes`` (names).

        Raises:
            DataError: if a block is found cut or altered.
        """
        if not len(numbers):
            raise ValueError("cannot stack zero episodes")
        numbers = [int(e) for e in numbers]
        drawn = self.sampler.draw(seed, stream, numbers, None)
        names = self.sampler.pool.names
        info = tuple({"classes": [names[c] for c in classes]} for classes in drawn.classes.tolist())
        batch = EpisodeBatch(self._part(drawn.rows[..., : self.shots]), self._part(drawn.rows[..., self.shots :]), info)
        if self.renamed and self.split_name == self._renamed_split:
            batch = self._with_other_words(batch, seed, stream, numbers)
        batch = arrange(batch, [(seed, stream, number) for number in numbers], self.order, self.labels)
        if not self.outsiders:
            return batch
        inside = drawn.classes if self._strangers is None else None
        pool = self._strangers or self.sampler.pool
        return with_outsiders(batch, self._tokens(outsider_rows(pool, self.outsiders, seed, stream, numbers, inside)))

    def every_text(self, split: str) -> NDArray[np.int64]:
        """The tokens of all texts of a split, ``[n, length]``; of this source's own, if the set lacks it."""
        there = split if split in self._shards.manifest.splits else self.split_name
        index = self._shards.index["class"]
        blocks = np.flatnonzero(np.isin(index, self._shards.classes_of(there)))
        rows = [np.arange(self._shards.rows[b], self._shards.rows[b + 1]) for b in blocks]
        return self._store.gather(np.concatenate(rows))

    def _with_other_words(self, batch: EpisodeBatch, seed: int, stream: str, numbers: Sequence[int]) -> EpisodeBatch:
        """Each word of an episode is, by chance, another of the vocabulary wherever it stands."""
        for task, number in enumerate(numbers):
            rng = Rng(seed, f"{stream}/renamed", number)
            others = 1 + rng.integers(self.vocabulary - 1, self.vocabulary)
            stays = rng.uniform(size=self.vocabulary) >= self.renamed
            table = np.where(stays, np.arange(self.vocabulary), others)
            table[PADDING] = PADDING
            for x in (batch.support.x, batch.query.x):
                x[task] = torch.from_numpy(table[x[task].numpy()])
        return batch

    def _part(self, rows: Ints) -> Examples:
        """Examples of rows ``[T, N, n]``."""
        tasks, ways, each = rows.shape
        y = torch.arange(ways).repeat_interleave(each).repeat(tasks, 1)
        return Examples(self._tokens(rows.reshape(tasks, -1)), y)

    def _tokens(self, rows: Ints) -> Tensor:
        return torch.from_numpy(self._store.gather(rows))

    def describe(self) -> dict[str, Any]:
        """What a run should remember of its data."""
        m = self._shards.manifest
        return {
            "content_id": m.content_id,
            "name": m.name,
            "path": self.path,
            "split": self.split_name,
            "classes": len(self.sampler.pool),
            "examples": int(self.sampler.pool.examples.sum()),
            "ways": self.ways,
            "shots": self.shots,
            "query_shots": self.query_shots,
            "tokens": self.tokens.kind,
            "length": self.tokens.length,
            "vocabulary": self.vocabulary,
            "renamed": self.renamed,
            "order": self.order,
            "labels": self.labels,
            "licence": m.licence,
        }
