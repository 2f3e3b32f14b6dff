"""Episodes as a WebDataset pipeline that can start anywhere.

A sample of the pipeline is an episode. The source draws it and reads the class blocks it brings in, each checked;
two more stages decode them and put the episode together. The rest is the reader's own::

    stream = EpisodeStream(ShardSet(path), UniformSampler(pool, 5, 2), shots=1, seed=0)
    for episode in stream.seek(100_000).map(augment).prefetch(8):
        ...
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import webdataset
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from metadist.data.assemble import assemble
from metadist.data.planes import empty_images, planes
from metadist.data.prefetch import Prefetch
from metadist.data.samplers import Ints, Sampler
from metadist.data.shards import ShardSet
from metadist.episode import Episode

Sample = dict[str, Any]
DRAWN_TOGETHER = 64


class Step(NamedTuple):
    """One episode as it is drawn, before anything is read.

    Args:
        number: the episode's.
        incoming: blocks to bring in for it, in the order of use.
        blocks, within: block of each example, and its place in there, both ``ways * per_class`` long, class by class.
        turns: quarter turns of each class, int64 ``[ways]``.
        info: what the episode tells of itself.
    """

    number: int
    incoming: list[int]
    blocks: list[int]
    within: list[int]
    turns: Ints
    info: Sample


class Plan:
    """Which episodes a stream serves: numbers from ``start`` on, all of them drawn by arithmetic."""

    def __init__(self, shards: ShardSet, sampler: Sampler, shots: int, seed: int, stream: str, start: int) -> None:
        self.shards, self.sampler, self.shots = shards, sampler, shots
        self.seed, self.stream, self.start = seed, stream, start

    @property
    def window(self) -> int | None:
        """Slots of the sampler's window, if it has one."""
        return getattr(self.sampler, "window", None)

    def steps(self) -> Iterator[Step]:
        """Episodes without end, drawn many at a time; nothing is read for one before it is asked for.

        Under a DataLoader with k workers, worker i serves every k-th episode from the i-th, so that the
        loader's turn-taking gives them back in order. RANK and WORLD_SIZE are nobody's business here.
        """
        worker = get_worker_info()
        first, stride = (self.start, 1) if worker is None else (self.start + worker.id, worker.num_workers)
        last: int | None = None
        for begin in count(first, DRAWN_TOGETHER * stride):
            numbers = range(begin, begin + DRAWN_TOGETHER * stride, stride)
            yield from self._drawn(numbers, last)
            last = numbers[-1]

    def _drawn(self, numbers: range, last: int | None) -> list[Step]:
        draws = self.sampler.draw(self.seed, self.stream, numbers)
        rows = draws.rows.reshape(len(numbers), -1)
        blocks = np.searchsorted(self.shards.rows, rows, side="right") - 1
        columns = (
            numbers,
            self.sampler.arrivals(self.seed, self.stream, numbers, last, draws.rows),
            blocks.tolist(),
            (rows - self.shards.rows[blocks]).tolist(),
            draws.turns,
            self._infos(numbers, draws.classes, draws.turns),
        )
        return [Step(*of_episode) for of_episode in zip(*columns, strict=True)]

    def _infos(self, numbers: range, classes: Ints, turns: Ints) -> list[Sample]:
        names = self.sampler.pool.names
        return [
            {"episode": e, "classes": [names[c] for c in of_episode], "turns": degrees}
            for e, of_episode, degrees in zip(numbers, classes.tolist(), (90 * turns).tolist(), strict=True)
        ]


class BlockSource(webdataset.pipeline.PipelineStage):
    """Source stage: the bytes of the class blocks that each episode brings in, read by seeks and checked."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def run(self) -> Iterator[Sample]:
        """Yields ``{"__key__", "__url__", "step", "raw", "blocks"}`` an episode.

        ``raw`` has (number, json, payload) of each of ``step.incoming``. Without a window, those that the shard set
        kept from before (see its ``cache_bytes``) are not read again: they are pairs (number, array) in ``blocks``.
        """
        plan, shards, url = self.plan, self.plan.shards, str(self.plan.shards.path)
        for step in plan.steps():
            blocks = [] if plan.window else [(b, x) for b in step.incoming if (x := shards.kept(b)) is not None]
            here = {b for b, _ in blocks}
            raw = deque((b, *shards.raw(b)) for b in step.incoming if b not in here)
            key = f"{plan.stream}-{step.number:09d}"
            yield {"__key__": key, "__url__": url, "step": step, "raw": raw, "blocks": blocks}


class Decode(webdataset.pipeline.PipelineStage):
    """Stage: bytes to arrays by our own decoders, which run no code (WebDataset's run pickles)."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def run(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Adds to ``blocks`` a pair of each of ``raw``: its number and uint8 ``[n, *shape]``."""
        shards = self.plan.shards
        keep = (lambda _, x: x) if self.plan.window else shards.keep
        for s in samples:
            raw = s.pop("raw")
            while raw:  # a first window may be large: its bytes are let go of one block after another
                b, head, payload = raw.popleft()
                s["blocks"].append((b, keep(b, shards.decode(b, head, payload))))
            yield s


class Slots(webdataset.pipeline.PipelineStage):
    """Stage: blocks to episodes. Between episodes it holds the blocks of the window (or of one episode) and no more."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def run(self, samples: Iterable[Sample]) -> Iterator[Episode]:
        """Yields an :class:`Episode` of each number, ``info`` with its number, classes and turns in degrees."""
        window = self.plan.window
        slots: deque[int] = deque()
        uses: Counter[int] = Counter()
        held: dict[int, NDArray[np.uint8]] = {}
        for s in samples:
            if window is None:
                held = dict(s["blocks"])
            else:
                for b, block in s["blocks"]:
                    slots.append(b)
                    uses[b] += 1
                    held[b] = block
                while len(slots) > window:
                    old = slots.popleft()
                    uses[old] -= 1
                    if not uses[old]:
                        del uses[old], held[old]
            yield self._episode(s["step"], held)

    def _episode(self, step: Step, held: dict[int, NDArray[np.uint8]]) -> Episode:
        images = empty_images(len(step.blocks), self.plan.shards.manifest.field.shape)
        to, by_block = planes(images), {b: planes(held[b]) for b in set(step.blocks)}
        for place, (b, i) in enumerate(zip(step.blocks, step.within, strict=True)):
            to[place] = by_block[b][i]
        support, query = assemble(images, step.turns, self.plan.shots)
        return Episode(support, query, step.info)


class Ahead(webdataset.pipeline.PipelineStage):
    """Stage: runs everything before it in a background thread (see :class:`Prefetch`)."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.running: weakref.WeakSet[Prefetch[Any]] = weakref.WeakSet()

    def run(self, samples: Iterable[Any]) -> Iterator[Any]:
        """The same samples, up to ``depth`` ahead."""
        ahead = Prefetch(samples, self.depth)
        self.running.add(ahead)
        try:
            yield from ahead
        finally:
            ahead.close()

    def close(self) -> None:
        """Stops the threads."""
        for ahead in list(self.running):
            ahead.close()


class EpisodeStream(webdataset.DataPipeline, webdataset.FluidInterface):  # type: ignore[misc]
    """Endless episodes of one stream, from any number on, as a WebDataset pipeline.

    Its methods (``map``, ``select``, ``slice``, ...) add stages as for any ``webdataset`` pipeline.

    Args:
        shards: an opened shard set of images.
        sampler: draws episodes from a pool of ``shards``.
        shots: support examples of a class; the rest of ``sampler.per_class`` are for the query.
        seed: the run's seed.
        stream: name of the stream, e.g. ``train``.
        start: number of the first episode.

    Raises:
        DataError: while iterating, if a block is cut or altered.
    """

    def __init__(
        self, shards: ShardSet, sampler: Sampler, *, shots: int, seed: int, stream: str = "train", start: int = 0
    ) -> None:
        self.plan = Plan(shards, sampler, shots, seed, stream, start)
        super().__init__(BlockSource(self.plan), Decode(self.plan), Slots(self.plan))

    def seek(self, number: int) -> EpisodeStream:
        """The same pipeline from episode ``number`` on. Nothing is replayed: it is arithmetic."""
        if number < 0:
            raise ValueError(f"episode {number} does not exist; the first is 0")
        plan = copy.copy(self.plan)
        plan.start = number
        moved = copy.copy(self)
        moved.plan = plan
        moved.pipeline = [type(s)(plan) if isinstance(s, (BlockSource, Decode, Slots)) else s for s in self.pipeline]
        return moved

    def prefetch(self, depth: int = 4) -> EpisodeStream:
        """The same pipeline with all stages so far in a background thread, up to ``depth`` samples ahead."""
        return self.compose(Ahead(depth))  # type: ignore[no-any-return]

    def close(self) -> None:
        """Stops background threads and closes the files."""
        for stage in self.pipeline:
            if isinstance(stage, Ahead):
                stage.close()
        self.plan.shards.close()
