"""Few-shot classification over a shard set of images."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metadist.data.assemble import assemble
from metadist.data.planes import empty_images, planes
from metadist.data.samplers import Draws, Ints, UniformSampler, WindowSampler, Words
from metadist.data.shards import ShardSet
from metadist.episode import Episode, EpisodeBatch
from metadist.errors import DataError
from metadist.seeding import Rng
from metadist.tasks.augmentation import Augmentation
from metadist.tasks.packed import PackedTasks, check_sizes
from metadist.tasks.sequences import arrange, check_choices

ROTATIONS = ("none", "classes", "task")
RESIDENT_LIMIT = 1 << 30
_WINDOW_DEFAULTS = {"blocks": 300, "reuse": 0.5}


class Resident:
    """Every example of the splits in use, in memory: a batch is one gather."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self._reset()

    def _reset(self) -> None:
        # Pages that are never loaded take no memory.
        self._examples = empty_images(int(self.shards.rows[-1]), self.shards.manifest.field.shape)
        self._loaded = np.zeros(len(self.shards.index), dtype=bool)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Only the set travels to another process, which loads its own; the splits loaded are remembered."""
        return {"shards": self.shards, "blocks": np.flatnonzero(self._loaded)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shards = state["shards"]
        self._reset()
        self.load(state["blocks"])

    def load(self, blocks: Ints) -> None:
        """Reads and checks the blocks that are not here yet."""
        with self._lock:
            for b in blocks[~self._loaded[blocks]].tolist():
                a, z = self.shards.rows[b], self.shards.rows[b + 1]
                planes(self._examples)[a:z] = planes(self.shards.read(b))
                self._loaded[b] = True
        self.shards.close()

    def gather(self, rows: Ints) -> NDArray[np.uint8]:
        """Examples by their rows, uint8 ``[R, *shape]``."""
        return self._examples[rows]


class ShardTasks(PackedTasks):
    """N-way K-shot tasks over the classes of a shard set.

    Args:
        path: directory of the shard set (``metadist data pack``).
        ways: classes of a task, N.
        shots: support examples of a class, K.
        query_shots: query examples of a class.
        split: ``train``, ``validation`` or ``test``; ``"train+validation"`` joins two.
        sampler: ``"uniform"``, or ``{"type": "window", "blocks": W, "reuse": r}`` for a set larger than memory
            (see :class:`~metadist.data.samplers.WindowSampler`).
        rotations: ``none``; ``classes``: each quarter turn of a class is a class of its own; ``task``: each
            class of a task is turned by a quarter turn drawn for that task.
        resident: keep the split in memory; ``"auto"`` does so up to 1 GiB with the uniform sampler. The
            episodes are the same either way.
        order, labels: see :func:`~metadist.tasks.sequences.arrange`.
        augmentation: changes to the pictures of ``split``, see :class:`~metadist.tasks.augmentation.Augmentation`;
            the other splits show theirs as they are.
        left_out: keys of blocks that are taken not to be there.

    Raises:
        DataError: if the set is missing, damaged or of a newer schema, lacks the split, or is too small for the
            ways and shots asked for.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        ways: int,
        shots: int,
        query_shots: int,
        split: str = "train",
        sampler: str | Mapping[str, Any] = "uniform",
        rotations: str = "none",
        resident: bool | str = "auto",
        order: str = "by_class",
        labels: str = "index",
        augmentation: Augmentation | Mapping[str, Any] | None = None,
        left_out: Sequence[str] | None = None,
    ) -> None:
        check_choices(order, labels)
        self.augmentation, self._augmented_split = Augmentation.of(augmentation), split
        self.order, self.labels = order, labels
        self.path = os.fspath(path)
        check_sizes(ways=ways, shots=shots, query_shots=query_shots)
        if rotations not in ROTATIONS:
            raise DataError("tasks.rotations", f"{rotations!r} is none of {', '.join(ROTATIONS)}")
        if resident not in (True, False, "auto"):
            raise DataError("tasks.resident", f"{resident!r} is none of true, false, auto")
        self.ways, self.shots, self.query_shots, self.rotations = ways, shots, query_shots, rotations
        self.sampler_options = _sampler_options(sampler)
        self.resident = resident
        self.left_out = tuple(sorted(left_out or ()))
        self._shards = ShardSet(path, left_out=frozenset(self.left_out))
        self._check_images()
        self._store: Resident | None = None
        self._use(split)

    def _check_images(self) -> None:
        kept = self._shards.manifest.field
        if kept.encoding == "utf-8":
            raise DataError(self.path, "holds text, not images", "use tasks.type: texts, or choose a set of images")
        if self.rotations != "none" and kept.shape[0] != kept.shape[1]:
            found = f"{self.rotations!r} needs square images, but these are {list(kept.shape)}"
            raise DataError("tasks.rotations", found, "use 'none', or pack the images square")

    def _use(self, split: str) -> None:
        """Takes the classes of ``split``; what it needs of the disk is read and checked here."""
        self.split_name = split
        pool = self._shards.pool(split, turned=self.rotations == "classes")
        options = dict(self.sampler_options)
        kind = options.pop("type")
        per_class = self.shots + self.query_shots
        if self.ways > len(pool):
            counted = " (quarter turns counted)" if self.rotations == "classes" else ""
            found = f"{self.ways} ways, but split {split!r} has {len(pool)} classes{counted}"
            raise DataError("tasks.ways", found, f"ask for at most {len(pool)}")
        turn = self.rotations == "task"
        self.sampler: UniformSampler | WindowSampler
        if kind == "uniform":
            self.sampler = UniformSampler(pool, self.ways, per_class, turn)
        else:
            size = {"window": options["blocks"], "reuse": options["reuse"]}
            self.sampler = WindowSampler(pool, self.ways, per_class, turn, **size)
        blocks = self._blocks(split)
        example_bytes = int(np.prod(self._shards.manifest.field.shape))
        if kind == "window":
            block_bytes = example_bytes * int(self._shards.index["n"].max())
            # Room for the window and as much again, for episodes that are asked for a little out of order.
            self._shards.cache_bytes = max(self._shards.cache_bytes, 2 * options["blocks"] * block_bytes)
        split_bytes = int(self._shards.index["n"][blocks].sum()) * example_bytes
        if self.resident is True or (self.resident == "auto" and kind == "uniform" and split_bytes <= RESIDENT_LIMIT):
            self._store = self._store or Resident(self._shards)
            self._store.load(blocks)
        else:
            self._store = None

    def _blocks(self, split: str) -> Ints:
        """Numbers of the blocks of a split's classes."""
        return np.flatnonzero(np.isin(self._shards.index["class"], self._shards.classes_of(split)))

    def sample(self, rng: Rng) -> Episode:
        """One episode; of ``Rng(seed, stream, e)`` it is episode ``e`` of :meth:`episodes`."""
        words = rng.raw(self.sampler.words_per_episode)[None]
        return self._batch(rng.seed, rng.stream, [rng.index], words)[0]

    def episodes(self, seed: int, stream: str, numbers: Sequence[int]) -> EpisodeBatch:
        """The episodes of ``numbers``, in that order, whatever they are.

        Returns:
            support.x float32 ``[T, ways * shots, C, H, W]`` in [0, 1], support.y int64 ``[T, ways * shots]`` in
            0..ways-1, all of class 0 first unless another order is asked for; the query likewise with
            ``query_shots``. ``info`` of each episode has ``classes`` (names) and ``turns`` (degrees,
            counter-clockwise).

        Raises:
            DataError: if a block is found cut or altered.
        """
        if not len(numbers):
            raise ValueError("cannot stack zero episodes")
        return self._batch(seed, stream, [int(e) for e in numbers], None)

    def _batch(self, seed: int, stream: str, numbers: Sequence[int], words: Words | None) -> EpisodeBatch:
        drawn = self.sampler.draw(seed, stream, numbers, words)
        gather = self._shards.gather if self._store is None else self._store.gather
        support, query = assemble(gather(drawn.rows.ravel()), drawn.turns, self.shots)
        batch = EpisodeBatch(support, query, self._info(drawn))
        if self.split_name == self._augmented_split:
            batch = self.augmentation.apply(batch, seed, stream, numbers)
        return arrange(batch, [(seed, stream, number) for number in numbers], self.order, self.labels)

    def _info(self, drawn: Draws) -> tuple[dict[str, Any], ...]:
        names, degrees = self.sampler.pool.names, (drawn.turns * 90).tolist()
        return tuple(
            {"classes": [names[c] for c in classes], "turns": turns}
            for classes, turns in zip(drawn.classes.tolist(), degrees, strict=True)
        )

    def describe(self) -> dict[str, Any]:
        """What a run should remember of its data."""
        m = self._shards.manifest
        return {
            "content_id": _content_id(m.content_id, self.left_out),
            "left_out": len(self.left_out),
            "name": m.name,
            "path": self.path,
            "split": self.split_name,
            "classes": len(self.sampler.pool),
            "examples": int(self._shards.index["n"][self._blocks(self.split_name)].sum()),
            "shape": list(m.field.shape),
            "ways": self.ways,
            "shots": self.shots,
            "query_shots": self.query_shots,
            "rotations": self.rotations,
            "augmentation": asdict(self.augmentation),
            "order": self.order,
            "labels": self.labels,
            "sampler": dict(self.sampler_options),
            "licence": m.licence,
        }


def _content_id(whole: str, left_out: Sequence[str]) -> str:
    """What the data are known by: a set without some of its blocks is another one."""
    if not left_out:
        return whole
    return "sha256:" + hashlib.sha256(" ".join([whole, *left_out]).encode()).hexdigest()


def _sampler_options(sampler: str | Mapping[str, Any]) -> dict[str, Any]:
    """The sampler resolved, ``{"type": ...}`` and its options.

    Raises:
        DataError: if there is no such sampler or option.
    """
    given = {"type": sampler} if isinstance(sampler, str) else dict(sampler)
    kind = given.get("type")
    if kind == "uniform":
        known: dict[str, Any] = {"type": "uniform"}
    elif kind == "window":
        known = {"type": "window", **_WINDOW_DEFAULTS}
    else:
        raise DataError("tasks.sampler", f"{kind!r} is no sampler", "use 'uniform' or 'window'")
    for option in given:
        if option not in known:
            has = ", ".join(sorted(known))
            raise DataError(f"tasks.sampler.{option}", f"the {kind} sampler has no such option", f"it has {has}")
    options = {**known, **given}
    for option, wanted, mend in (("blocks", int, "a whole number"), ("reuse", (int, float), "a number")):
        value = options.get(option, 1)
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise DataError(f"tasks.sampler.{option}", f"{value!r} is not {mend}")
    return options
