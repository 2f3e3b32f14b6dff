"""What workers are asked for and answer: rounds, leases and reports. Plain values, without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Moment:
    """Which piece of a run is being computed.

    Args:
        version: meta-updates made so far.
        microbatch: number of the microbatch.
        microbatches: how many there are in the meta-batch.
        seed: for what the learner draws itself; another for each microbatch of each version, whoever computes it.
        place: of the batch's first task in the microbatch; not 0 only where a part of it is computed again.
    """

    version: int = 0
    microbatch: int = 0
    microbatches: int = 1
    seed: int = 0
    place: int = 0

    def since(self, held: int) -> int:
        """Meta-updates since the microbatch's tasks were drawn, in ``[0, held)``, if each is held for ``held``.

        Microbatches draw theirs at different times, so that no update is made of new tasks alone. At version 0
        most are thus part of the way to their first change; :meth:`starts` says when work on a task begins.
        """
        return (self.version + self.microbatch * held // self.microbatches) % held

    def starts(self, held: int) -> bool:
        """Whether the microbatch's tasks are new at this version."""
        return self.version == 0 or self.since(held) == 0


@dataclass(frozen=True)
class EpisodeSize:
    """The size of an episode, where it differs from the config's ``tasks`` section; None where it does not."""

    ways: int | None = None
    shots: int | None = None
    query_shots: int | None = None
    outsiders: int | None = None

    def given(self) -> dict[str, int]:
        """The numbers that differ."""
        return {k: v for k, v in self.__dict__.items() if v is not None}


@dataclass(frozen=True)
class Round:
    """One meta-batch of training, or one evaluation: numbered tasks, cut into microbatches.

    Args:
        kind: ``train`` returns gradients, ``evaluate`` metrics alone.
        version: of the meta-parameters it is computed with.
        split: the classes it draws from.
        stream: the sequence its episodes are numbered in.
        first: number of its first episode.
        tasks: how many episodes.
        tasks_per_microbatch: episodes of a microbatch; the last may hold fewer.
        size: of the episodes, where it differs from the config's.
        held: rounds for which each microbatch keeps its episodes.
    """

    kind: Literal["train", "evaluate"]
    version: int
    split: str
    stream: str
    first: int
    tasks: int
    tasks_per_microbatch: int
    size: EpisodeSize = EpisodeSize()
    held: int = 1

    @property
    def microbatches(self) -> int:
        return -(-self.tasks // self.tasks_per_microbatch)

    def episodes(self, microbatch: int) -> range:
        """Numbers of the episodes of one microbatch."""
        first, start = self._first(microbatch), microbatch * self.tasks_per_microbatch
        return range(first + start, first + min(start + self.tasks_per_microbatch, self.tasks))

    def _first(self, microbatch: int) -> int:
        """Number of the first episode of the meta-batch that the microbatch's episodes were drawn for."""
        since = Moment(self.version, microbatch, self.microbatches).since(self.held)
        return self.first + (self.held - 1 - since) * self.tasks


@dataclass(frozen=True)
class Lease:
    """Consecutive microbatches ``[start, stop)`` of a round, lent to one worker. ``number`` is unique in a run."""

    number: int
    round: Round
    start: int
    stop: int


def lease_of(number: int, round: Round, microbatch: int) -> Lease:
    """The lease of one microbatch, by its number in the run, at the version of ``round``.

    Args:
        number: of the lease.
        round: any training round of that version.
        microbatch: as microbatches follow one another in a synchronous run.
    """
    meta_batch, place = divmod(microbatch, round.microbatches)
    return Lease(number, replace(round, first=meta_batch * round.tasks), place, place + 1)


def microbatch_of(lease: Lease) -> int:
    """The number in the run of a lease's first microbatch."""
    return lease.round.first // lease.round.tasks * lease.round.microbatches + lease.start


@dataclass(frozen=True)
class Report:
    """What a lease gave, without the gradients.

    Args:
        metrics: one float64 array ``[tasks of the lease]`` a metric, in the order of the episodes.
        compute_s: seconds of computing.
        data_wait_s: seconds spent waiting for episodes.
        bad_tasks: numbers of the episodes whose loss or gradient is not finite.
        memory: bytes by which the worker's memory grew at most, since before its first microbatch.
        programs: how many times the worker has traced or compiled something so far.
        gpu: of the worker's GPU, if it has one: see :func:`metadist.device.gpu_state`.
    """

    lease: Lease
    metrics: dict[str, np.ndarray]
    compute_s: float
    data_wait_s: float
    bad_tasks: list[int] = field(default_factory=list)
    memory: int = 0
    programs: int = 0
    gpu: dict[str, float] = field(default_factory=dict)


def sums_of(numbers: Iterable[int], count: int) -> int:
    """How many partial sums are left of some microbatches when they are added as far as the tree allows.

    Args:
        numbers: of the microbatches.
        count: microbatches of the whole sum (:class:`metadist.outer.gradient.TreeSum`).
    """
    level, width, left = set(numbers), count, 0
    while width > 1 and level:
        whole = {n >> 1 for n in level if n ^ 1 in level or n ^ 1 >= width}
        left += sum(n >> 1 not in whole for n in level)
        level, width = whole, (width + 1) // 2
    return left + len(level)
