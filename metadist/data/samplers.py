"""Which examples an episode is made of: arithmetic over numbers, with no file behind it.

Episode *e* of stream *s* is a function of (seed, s, e). Its choices are words of ``Rng(seed, s, e)``, read in
this order: ``ways`` words for the classes, ``ways * per_class`` for the examples (class by class), and, where
each class of a task is turned, ``ways`` for the quarter turns. An integer of ``[0, n)`` is ``word % n``, as in
:meth:`metadist.seeding.Rng.integers` but for its rejection of the last few words, which a run of any length
never meets (probability below ``n / 2**64`` a word); so a whole batch is drawn in a few NumPy calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from metadist.errors import DataError
from metadist.seeding import Rng, stream_id

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
# Philox-4x64 as Rng uses it: a value of its 256-bit counter gives four words, and episodes are 2**128 values apart.
_WORDS_A_COUNT, _EPISODE_BIT, _COUNTERS = 4, 128, 1 << 256


@dataclass(frozen=True)
class ClassPool:
    """The classes of one split as a sampler sees them: V classes, a turned one counting as its own.

    Args:
        names: name of each class, V of them (for messages and ``info``).
        turns: quarter turns of each class, int64 ``[V]`` in 0..3.
        first_block: number of the first block of each class in the set's index, int64 ``[V]``.
        blocks: blocks of each class, int64 ``[V]``; a class's blocks follow one another.
        block_rows: first row of each block among all examples of the set, int64 ``[B + 1]``.
    """

    names: Sequence[str]
    turns: Ints
    first_block: Ints
    blocks: Ints
    block_rows: Ints

    def __len__(self) -> int:
        return len(self.turns)

    @property
    def examples(self) -> Ints:
        """Examples of each class over all its blocks, int64 ``[V]``."""
        counts: Ints = self.block_rows[self.first_block + self.blocks] - self.block_rows[self.first_block]
        return counts


@dataclass(frozen=True)
class Draws:
    """What T episodes of N ways are made of.

    Args:
        classes: numbers of classes in the pool, int64 ``[T, N]``.
        rows: rows of examples in the set, int64 ``[T, N, per_class]``, support before query.
        turns: quarter turns to apply, int64 ``[T, N]`` in 0..3.
    """

    classes: Ints
    rows: Ints
    turns: Ints


class Sampler(Protocol):
    """How episodes are drawn from a pool."""

    pool: ClassPool

    @property
    def words_per_episode(self) -> int:
        """Random words that one episode takes."""

    def draw(self, seed: int, stream: str, numbers: Sequence[int], words: Words | None = None) -> Draws:
        """The episodes of ``numbers``, in that order.

        Args:
            seed: the run's seed.
            stream: name of the stream of episodes.
            numbers: T numbers of episodes, each at least 0.
            words: uint64 ``[T, words_per_episode]`` to draw with; those of (seed, stream, number) if none.
        """

    def incoming(self, seed: int, stream: str, number: int, last: int | None) -> list[int]:
        """Blocks that an iterator must bring in for episode ``number``, having served ``last`` before."""

    def arrivals(self, seed: int, stream: str, numbers: Sequence[int], last: int | None, rows: Ints) -> list[list[int]]:
        """What :meth:`incoming` says of each of ``numbers``, one after the other, given the ``rows`` drawn for them."""


def words_of(seed: int, stream: str, numbers: Sequence[int], count: int) -> Words:
    """The first ``count`` words of each episode's generator, ``Rng(seed, stream, number)``, uint64 ``[T, count]``."""
    words = np.empty((len(numbers), count), dtype=np.uint64)
    if not len(numbers):
        return words
    Rng(seed, stream, min(numbers)), Rng(seed, stream, max(numbers))  # refuses a number out of bounds
    # One generator moved on from number to number, which costs a third of making one for each.
    bits = np.random.Philox(key=np.array([seed, stream_id(stream)], dtype=np.uint64))
    at, used = 0, -(-count // _WORDS_A_COUNT)
    for row, number in enumerate(numbers):
        first = int(number) << _EPISODE_BIT
        bits.advance((first - at) % _COUNTERS)
        words[row], at = bits.random_raw(count), first + used
    return words


@lru_cache(maxsize=8)
def first_words(seed: int, stream: str, count: int) -> Words:
    """The first ``count`` words of number 0, kept for the next caller; do not alter it."""
    words = words_of(seed, stream, [0], count)[0]
    words.flags.writeable = False
    return words


def choices(words: Words, bounds: Ints) -> Ints:
    """``k`` distinct integers below each bound, by partial Fisher-Yates, a row at a time in parallel.

    Args:
        words: uint64 ``[R, k]``.
        bounds: int64 ``[R]``, each at least ``k``.

    Returns:
        int64 ``[R, k]``; row r is ``Rng.choice(bounds[r], k)`` of a generator whose words are ``words[r]``.
    """
    rows, k = words.shape
    at = np.arange(rows)
    # Instead of a whole array for each row we keep the k positions touched and what was put there.
    touched = np.full((rows, k), -1, dtype=np.int64)
    put = np.empty((rows, k), dtype=np.int64)
    chosen = np.empty((rows, k), dtype=np.int64)

    def held(position: Ints, step: int) -> Ints:
        if step == 0:
            return position
        hit = touched[:, step - 1 :: -1] == position[:, None]
        return np.where(hit.any(1), put[at, step - 1 - hit.argmax(1)], position)

    for i in range(k):
        j = i + (words[:, i] % (bounds - i).astype(np.uint64)).astype(np.int64)
        chosen[:, i] = held(j, i)
        put[:, i] = held(np.full(rows, i), i)
        touched[:, i] = j
    return chosen


@lru_cache(maxsize=64)
def permutation(seed: int, stream: str, number: int, n: int) -> Ints:
    """``Rng(seed, stream, number).permutation(n)``, int64 ``[n]``, kept for the next caller; do not alter it."""
    words = Rng(seed, stream, number).raw(n)
    offsets = (words % np.arange(n, 0, -1, dtype=np.uint64)).astype(np.int64).tolist()
    order = list(range(n))
    for i, offset in enumerate(offsets):
        order[i], order[i + offset] = order[i + offset], order[i]
    fixed = np.array(order, dtype=np.int64)
    fixed.flags.writeable = False
    return fixed


class _Base:
    """What both samplers share: the size of an episode and how its words are cut."""

    def __init__(self, pool: ClassPool, ways: int, per_class: int, turn_each_task: bool = False) -> None:
        for name, value in (("tasks.ways", ways), ("tasks.shots + tasks.query_shots", per_class)):
            if value < 1:
                raise DataError(name, f"{value} is too few", "it must be at least 1")
        if ways > len(pool):
            raise DataError("tasks.ways", f"{ways} ways, but the split has {len(pool)} classes", "ask for fewer ways")
        self.pool, self.ways, self.per_class, self.turn_each_task = pool, ways, per_class, turn_each_task

    @property
    def words_per_episode(self) -> int:
        return self.ways * (1 + self.per_class + int(self.turn_each_task))

    def _words(self, seed: int, stream: str, numbers: Sequence[int], words: Words | None) -> Words:
        return words_of(seed, stream, numbers, self.words_per_episode) if words is None else words

    def _example_words(self, words: Words) -> Words:
        n = self.ways
        return words[:, n : n + n * self.per_class].reshape(-1, self.per_class)

    def _turns(self, classes: Ints, words: Words) -> Ints:
        turns = self.pool.turns[classes]
        if self.turn_each_task:
            turns = (turns + (words[:, -self.ways :] % np.uint64(4)).astype(np.int64)) % 4
        return turns

    def _too_small(self, held: int, name: str, unit: str) -> DataError:
        return DataError(
            "tasks.shots + tasks.query_shots",
            f"{self.per_class} examples of each class, but {unit} of class {name!r} holds {held}",
            f"ask for at most {held}, or leave the class out when packing",
        )


class UniformSampler(_Base):
    """Any ``ways`` classes, then any ``per_class`` examples of each, over all of its blocks.

    Args:
        pool: the classes.
        ways: classes of an episode, at most as many as the pool has.
        per_class: examples of each class, ``shots + query_shots``.
        turn_each_task: turn each class of a task by a quarter turn drawn for that task.

    Raises:
        DataError: if the pool has too few classes or a class too few examples.
    """

    def __init__(self, pool: ClassPool, ways: int, per_class: int, turn_each_task: bool = False) -> None:
        super().__init__(pool, ways, per_class, turn_each_task)
        smallest = int(pool.examples.argmin())
        if (held := int(pool.examples[smallest])) < per_class:
            raise self._too_small(held, pool.names[smallest], "the whole")

    def draw(self, seed: int, stream: str, numbers: Sequence[int], words: Words | None = None) -> Draws:
        """See :meth:`Sampler.draw`."""
        words = self._words(seed, stream, numbers, words)
        classes = choices(words[:, : self.ways], np.full(len(words), len(self.pool)))
        picked = choices(self._example_words(words), self.pool.examples[classes.ravel()])
        first = self.pool.block_rows[self.pool.first_block[classes]]
        rows = first[..., None] + picked.reshape(*classes.shape, self.per_class)
        return Draws(classes, rows, self._turns(classes, words))

    def incoming(self, seed: int, stream: str, number: int, last: int | None) -> list[int]:
        """The blocks that hold the episode's examples, each once, in the order of their first use."""
        return self.arrivals(seed, stream, [number], last, self.draw(seed, stream, [number]).rows)[0]

    def arrivals(self, seed: int, stream: str, numbers: Sequence[int], last: int | None, rows: Ints) -> list[list[int]]:
        """See :meth:`Sampler.arrivals`."""
        blocks = np.searchsorted(self.pool.block_rows, rows.reshape(len(numbers), -1), side="right") - 1
        return [list(dict.fromkeys(of_episode)) for of_episode in blocks.tolist()]


class WindowSampler(_Base):
    """Classes out of a window that slides over the set, for sets larger than memory.

    A stream's slots are permutations of the classes, one after another; pass *p* over the classes takes block
    ``(o + p) % blocks`` of a class (``o`` drawn once for each class of the stream), so every block gets its
    turn. Episode *e* draws from slots ``[floor(e * reuse), floor(e * reuse) + window)``: ``ways`` distinct
    classes, then ``per_class`` examples of the block in that slot. A slot stays in the window for
    ``window / reuse`` episodes (exactly, where that is whole), so every class does in each pass but for the
    first ``window - 1`` slots of the stream. Where a window holds a class twice (it spans two passes), the
    newer slot counts.

    Args:
        pool, ways, per_class, turn_each_task: as for :class:`UniformSampler`.
        window: slots in the window (DESIGN: W); memory is this many blocks.
        reuse: new slots an episode brings in (r), above 0; 0.5 reads one block every second episode.

    Raises:
        DataError: as for :class:`UniformSampler`, a block counting instead of a class; or if some window could
            hold fewer than ``ways`` distinct classes.
    """

    def __init__(
        self, pool: ClassPool, ways: int, per_class: int, turn_each_task: bool = False, *, window: int, reuse: float
    ) -> None:
        super().__init__(pool, ways, per_class, turn_each_task)
        if not reuse > 0 or window < 1:
            found = f"window of {window} blocks, reuse {reuse:g}"
            raise DataError("tasks.sampler", found, "blocks must be at least 1, reuse above 0")
        # The rational that was meant: 0.1 is one slot every ten episodes, not 0.1000000000000000055.
        self.window, self.reuse = window, Fraction(reuse).limit_denominator(10**6)
        if self.reuse <= 0:
            raise DataError("tasks.sampler.reuse", f"{reuse:g} is too small", "use at least 0.000001")
        certain = min(len(pool), (window + 1) // 2)
        if ways > certain:
            raise DataError(
                "tasks.sampler.blocks",
                f"a window of {window} blocks may hold only {certain} distinct classes where two passes meet, "
                f"but tasks.ways is {ways}",
                f"use at least {2 * ways - 1} blocks",
            )
        self._check_blocks()

    def _check_blocks(self) -> None:
        sizes = np.diff(self.pool.block_rows)
        for i, (first, count) in enumerate(zip(self.pool.first_block, self.pool.blocks, strict=True)):
            if (held := int(sizes[first : first + count].min())) < self.per_class:
                raise self._too_small(held, self.pool.names[i], "a block")

    def start(self, number: int) -> int:
        """First slot of episode ``number``'s window."""
        return int(number * self.reuse.numerator // self.reuse.denominator)

    def slots(self, seed: int, stream: str, slots: Ints) -> tuple[Ints, Ints]:
        """Class (number in the pool) and block (number in the index) of each slot, both int64, shaped as ``slots``."""
        n = len(self.pool)
        passes, places = np.divmod(slots, n)
        classes = np.empty_like(slots)
        for p in np.unique(passes).tolist():
            here = passes == p
            classes[here] = permutation(seed, f"{stream}/window", p, n)[places[here]]
        many = self.pool.blocks[classes]
        offsets = first_words(seed, f"{stream}/window/blocks", n)[classes] % many.astype(np.uint64)
        return classes, self.pool.first_block[classes] + (offsets.astype(np.int64) + passes) % many

    def draw(self, seed: int, stream: str, numbers: Sequence[int], words: Words | None = None) -> Draws:
        """See :meth:`Sampler.draw`."""
        words = self._words(seed, stream, numbers, words)
        starts = self._starts(numbers)
        chosen = self._places(seed, stream, starts, words[:, : self.ways])
        classes, blocks = self.slots(seed, stream, starts[:, None] + chosen)
        first = self.pool.block_rows[blocks]
        held = (self.pool.block_rows[blocks + 1] - first).ravel()
        picked = choices(self._example_words(words), held).reshape(*classes.shape, self.per_class)
        return Draws(classes, first[..., None] + picked, self._turns(classes, words))

    def _starts(self, numbers: Sequence[int]) -> Ints:
        return np.array([self.start(int(e)) for e in numbers], dtype=np.int64)

    def _places(self, seed: int, stream: str, starts: Ints, words: Words) -> Ints:
        """Places of distinct classes in the windows that begin at ``starts``, int64 ``[T, ways]``.

        A window within one pass holds each class once, so any place will do; only where passes meet is the window
        looked at slot by slot.
        """
        n = len(self.pool)
        meets = starts % n + self.window > n
        begins, which = np.unique(starts[meets], return_inverse=True)
        newest = [self._newest(seed, stream, int(start)) for start in begins]
        distinct = np.full(len(starts), self.window, dtype=np.int64)
        distinct[meets] = np.array([len(places) for places in newest], dtype=np.int64)[which]
        chosen = choices(words, distinct)
        for row, i in zip(np.flatnonzero(meets), which, strict=True):
            chosen[row] = newest[i][chosen[row]]
        return chosen

    def _newest(self, seed: int, stream: str, start: int) -> Ints:
        """Places in one window whose class does not come again later, ascending."""
        classes, _ = self.slots(seed, stream, np.arange(start, start + self.window))
        _, from_end = np.unique(classes[::-1], return_index=True)
        return np.sort(self.window - 1 - from_end)

    def incoming(self, seed: int, stream: str, number: int, last: int | None) -> list[int]:
        """Blocks of the slots that enter the window between episodes ``last`` and ``number``, in slot order."""
        return self.arrivals(seed, stream, [number], last, np.empty(0, dtype=np.int64))[0]

    def arrivals(self, seed: int, stream: str, numbers: Sequence[int], last: int | None, rows: Ints) -> list[list[int]]:
        """See :meth:`Sampler.arrivals`; the window does not depend on ``rows``."""
        starts = self._starts(numbers)
        stops = starts + self.window
        seen = starts[:1] if last is None else self._starts([last]) + self.window
        begins = np.maximum(np.concatenate([seen, stops[:-1]]), starts)
        counts = np.maximum(stops - begins, 0)
        slots = np.concatenate([np.arange(a, a + k) for a, k in zip(begins, counts, strict=True)])
        if not len(slots):
            return [[] for _ in numbers]
        blocks = self.slots(seed, stream, slots)[1].tolist()
        ends = np.cumsum(counts).tolist()
        return [blocks[z - k : z] for z, k in zip(ends, counts.tolist(), strict=True)]
