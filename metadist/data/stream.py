"""Episodes as a WebDataset pipeline that can start anywhere.

The source reads class blocks by the index, in the order in which episodes will need them, each checked; two more
stages decode them and put episodes together. The rest is the reader's own::

    stream = EpisodeStream(ShardSet(path), UniformSampler(pool, 5, 2), shots=1, seed=0)
    for episode in stream.seek(100_000).map(augment).prefetch(8):
        ...
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import webdataset
from torch.utils.data import get_worker_info

from metadist.data.assemble import assemble
from metadist.data.prefetch import Prefetch
from metadist.data.samplers import Draws, Sampler
from metadist.data.shards import ShardSet
from metadist.episode import Episode

Sample = dict[str, Any]


class Plan:
    """Which episodes a stream serves: numbers from ``start`` on, all of them drawn by arithmetic."""

    def __init__(self, shards: ShardSet, sampler: Sampler, shots: int, seed: int, stream: str, start: int) -> None:
        self.shards, self.sampler, self.shots = shards, sampler, shots
        self.seed, self.stream, self.start = seed, stream, start

    def steps(self) -> Iterator[tuple[int, list[int]]]:
        """Numbers of episodes without end, each with the blocks to bring in for it.

        Under a DataLoader with k workers, worker i serves every k-th episode from the i-th, so that the
        loader's turn-taking gives them back in order. RANK and WORLD_SIZE are nobody's business here.
        """
        worker = get_worker_info()
        number, stride = self.start, 1
        if worker is not None:
            number, stride = number + worker.id, worker.num_workers
        last: int | None = None
        while True:
            yield number, self.sampler.incoming(self.seed, self.stream, number, last)
            last, number = number, number + stride


class BlockSource(webdataset.pipeline.PipelineStage):
    """Source stage: class blocks as WebDataset samples (bytes by extension), read by seeks and checked."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def run(self) -> Iterator[Sample]:
        """Yields ``{"__key__", "__url__", "__block__", "json", "x.npy" or "x.bin"}`` in the order of use."""
        shards = self.plan.shards
        for _, blocks in self.plan.steps():
            for b in blocks:
                head, payload = shards.raw(b)
                name = shards.manifest.shards[int(shards.index["shard"][b])].name
                yield {
                    "__key__": shards.index.key(b),
                    "__url__": name,
                    "__block__": b,
                    "json": head,
                    shards.manifest.field.member: payload,
                }


class Decode(webdataset.pipeline.PipelineStage):
    """Stage: bytes to arrays by our own decoders, which run no code (WebDataset's run pickles)."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def run(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Adds ``"x"``, uint8 ``[n, *shape]``, to each block."""
        shards = self.plan.shards
        for s in samples:
            yield {**s, "x": shards.decode(s["__block__"], s["json"], s[shards.manifest.field.member])}


class Slots(webdataset.pipeline.PipelineStage):
    """Stage: blocks to episodes. It holds the blocks of the window (or of the episode) and no more."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def run(self, samples: Iterable[Sample]) -> Iterator[Episode]:
        """Yields an :class:`Episode` of each number, ``info`` with its number, classes and turns in degrees."""
        plan, arrived = self.plan, iter(samples)
        window = getattr(plan.sampler, "window", None)
        held: deque[int] = deque()
        uses: Counter[int] = Counter()
        blocks: dict[int, Any] = {}
        for number, incoming in plan.steps():
            if window is None:
                held.clear()
                uses.clear()
                blocks.clear()
            for _ in incoming:
                sample = next(arrived)
                b = sample["__block__"]
                held.append(b)
                uses[b] += 1
                blocks[b] = sample["x"]
                while window is not None and len(held) > window:
                    old = held.popleft()
                    uses[old] -= 1
                    if not uses[old]:
                        del uses[old], blocks[old]
            yield self._episode(number, plan.sampler.draw(plan.seed, plan.stream, [number]), blocks)

    def _episode(self, number: int, draw: Draws, blocks: dict[int, Any]) -> Episode:
        plan, rows = self.plan, draw.rows[0]
        owners = np.searchsorted(plan.shards.rows, rows, side="right") - 1
        images = np.empty((1, *rows.shape, *plan.shards.manifest.field.shape), dtype=np.uint8)
        for place in np.ndindex(rows.shape):
            b = int(owners[place])
            images[(0, *place)] = blocks[b][rows[place] - plan.shards.rows[b]]
        support, query = assemble(images, draw.turns, plan.shots)
        names = plan.sampler.pool.names
        info = {
            "episode": number,
            "classes": [names[c] for c in draw.classes[0]],
            "turns": [90 * int(q) for q in draw.turns[0]],
        }
        return Episode((support.x[0], support.y[0]), (query.x[0], query.y[0]), info)  # type: ignore[arg-type]


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
