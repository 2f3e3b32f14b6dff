"""The parameter server, or a shard of it: sums a version's gradients, makes the next version. A plain class."""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from metadist.algorithms import Algorithm, Rule
from metadist.errors import ConfigError
from metadist.experiment import Experiment
from metadist.outer.gradient import Block, Layout, TreeSum
from metadist.outer.update import MetaUpdate, Prepared


class ParameterServer:
    """Holds the meta-parameters of one version and the optimizer that makes the next.

    Every message names its version and may come twice: what is late or doubled is dropped. It may hold a part of the
    vector alone; then :meth:`squares` of all parts go into the norm that is handed to :meth:`commit`.

    Args:
        weights: flat meta-parameters ``[numel]``.
        options: see :class:`metadist.outer.update.MetaUpdate`.
        version: of ``weights``.
        threads: CPU threads, or None to leave them as they are.
        views: hand out views of what it holds, which the next update changes, and no copies: for a caller who has sent
            them away by then.
    """

    def __init__(
        self,
        weights: np.ndarray,
        options: dict[str, Any],
        version: int = 0,
        threads: int | None = None,
        views: bool = False,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._views = views
        self._update = MetaUpdate(torch.from_numpy(np.array(weights)), options, version)
        self._sum: TreeSum | None = None
        self._prepared: Prepared | None = None
        self._stats: dict[str, float] = {}
        self._lock = threading.Lock()

    @classmethod
    def at(
        cls, snapshot: Mapping[str, Any], options: dict[str, Any], threads: int | None = None, views: bool = False
    ) -> ParameterServer:
        """A server that goes on from a :meth:`snapshot`; one without optimizer state is a start."""
        server = cls(snapshot["weights"], options, snapshot["version"], threads, views)
        if snapshot["outer_state"]:
            server.restore(snapshot)
        return server

    @property
    def version(self) -> int:
        """Updates made so far."""
        return self._update.version

    def add(self, version: int, count: int, blocks: Mapping[Block, np.ndarray]) -> int:
        """Takes partial sums computed at ``version``; returns how many were of use.

        Args:
            version: the version they were computed at; any but the present one's are dropped.
            count: microbatches of the whole meta-batch.
            blocks: partial sums by tree node.
        """
        with self._lock:
            if version != self.version or self._prepared is not None:
                return 0
            if self._sum is None:
                self._sum = TreeSum(count)
            return sum(self._sum.add(block, value) for block, value in blocks.items())

    def retract(self, slot: int) -> None:
        """Lets go of the gradient at a place of the sum, if it has come: another will take it.

        Raises:
            ValueError: it has been added to others.
        """
        with self._lock:
            if self._sum is not None:
                self._sum.discard(Block(0, slot))

    def squares(self, version: int, tasks: float, slots: Sequence[int] | None = None) -> list[float]:
        """Sums the gradients of ``version``; the sums of squares of its mean over ``tasks``, chunk by chunk.

        Args:
            version: the present one.
            tasks, slots: as of :meth:`commit`.

        Raises:
            ValueError: gradients are missing, or ``version`` is not the present one.
            FloatingPointError: what follows a rule is not finite; the version stays as it was.
        """
        with self._lock:
            if version != self.version:
                raise ValueError(f"asked to sum up version {version}, but the server holds {self.version}")
            return self._prepare(version, tasks, slots).squares

    def commit(
        self, version: int, tasks: float, norm: float | None = None, slots: Sequence[int] | None = None
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Makes ``version + 1``, once, and returns its weights and the update's statistics.

        Args:
            version: the present one, or the last: then what it made is told again.
            tasks: over how many the mean is taken.
            norm: of the whole mean gradient, if this server holds a part of it.
            slots: the places in the sum that are to be filled, if not all.

        Raises:
            ValueError: gradients are missing, or ``version`` is neither the present nor the last one.
            FloatingPointError: the sum is not finite; the version stays as it was.
        """
        with self._lock:
            if version == self.version:
                prepared, self._prepared = self._prepare(version, tasks, slots), None
                self._stats = self._update.move(prepared, norm)
            elif version != self.version - 1:
                raise ValueError(f"asked to commit version {version}, but the server holds {self.version}")
            return self.weights(), dict(self._stats)

    def _prepare(self, version: int, tasks: float, slots: Sequence[int] | None) -> Prepared:
        """The mean of what has come, once; what has come is let go."""
        if self._prepared is None:
            if self._sum is None:
                raise ValueError(f"no gradient of version {version} has come")
            gradients, self._sum = self._sum.addends(slots), None
            self._prepared = self._update.prepare(gradients, tasks)
        return self._prepared

    def weights(self) -> np.ndarray:
        """The flat meta-parameters ``[numel]``."""
        return self._given(self._update.vector)

    def move_into(self, memory: np.ndarray) -> None:
        """Keeps the meta-parameters in ``memory`` from now on, ``[numel]`` of their dtype: updates are made there."""
        with self._lock:
            self._update.move_into(torch.from_numpy(memory))

    def snapshot(self) -> dict[str, Any]:
        """Everything needed to go on from this version: ``version``, ``weights``, ``outer_state``."""
        with self._lock:
            state = {k: self._given(v) for k, v in self._update.state(copy=False).items()}
            return {"version": self.version, "weights": self.weights(), "outer_state": state}

    def _given(self, held: torch.Tensor) -> np.ndarray:
        held = held.detach()
        return held.numpy() if self._views else held.numpy().copy()

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Goes back to a :meth:`snapshot`."""
        with self._lock:
            state = {k: torch.from_numpy(np.array(v)) for k, v in snapshot["outer_state"].items()}
            self._update.load(torch.from_numpy(np.array(snapshot["weights"])), state, snapshot["version"])
            self._sum = self._prepared = None


def outer_options(experiment: Experiment, learner: Algorithm, layout: Layout) -> dict[str, Any]:
    """The ``outer`` section, with the sizes of the tensors and the places of what the optimizer is not to move.

    Raises:
        ConfigError: a pattern of what is frozen is the name of nothing that is learned.
    """
    section = experiment.config.outer
    rules = {name: rule.__dict__ for name, rule in learner.update_rules().items()}
    for pattern in section.frozen:
        named = fnmatch.filter(layout.names, pattern)
        if not named:
            known = ", ".join(layout.names)
            problem = f"{pattern!r} is the name of nothing that is learned"
            raise ConfigError("outer.frozen", problem, f"there is {known}")
        rules |= {name: Rule("keep").__dict__ for name in named}
    return {**section.model_dump(), "sizes": layout.sizes, "rules": layout.places(rules)}
