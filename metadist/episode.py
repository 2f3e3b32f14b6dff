"""The unit of learning to learn: a few examples to adapt to, a few to be judged on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

PADDING = 0
"""What inputs of whole numbers hold where there is nothing: behind the end of a short text, say."""


class Examples(NamedTuple):
    """Inputs ``x`` and targets ``y``; the leading dimension of both counts examples."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Episode:
    """One draw of a task.

    Args:
        support: examples to adapt to, ``x [S, ...]``, ``y [S, ...]``; a plain pair is accepted.
        query: examples to be judged on, ``x [Q, ...]``, ``y [Q, ...]``.
        info: what a person wants to know of the draw, e.g. the names of its classes.

    Raises:
        ValueError: if ``x`` and ``y`` of one set do not have the same number of examples.
    """

    support: Examples
    query: Examples
    info: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name in ("support", "query"):
            x, y = getattr(self, name)
            if len(x) != len(y):
                raise ValueError(f"episode {name}: {len(x)} inputs for {len(y)} targets; give as many of both")
            object.__setattr__(self, name, Examples(x, y))


@dataclass(frozen=True)
class EpisodeBatch:
    """Episodes of one shape, stacked: every tensor has the leading dimension *tasks*."""

    support: Examples
    query: Examples
    info: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)

    @classmethod
    def stack(cls, episodes: Sequence[Episode]) -> EpisodeBatch:
        """Stacks episodes of one shape.

        Raises:
            ValueError: if there are none or their shapes differ.
        """
        if not episodes:
            raise ValueError("cannot stack zero episodes")

        def stacked(tensors: Sequence[Tensor], what: str) -> Tensor:
            shapes = {tuple(t.shape) for t in tensors}
            if len(shapes) > 1:
                raise ValueError(
                    f"episodes of one batch must have one shape, but {what} came as {sorted(shapes)}; "
                    "make the task source draw the same number and shape of examples each time"
                )
            return torch.stack(list(tensors))

        sets = [
            Examples(*(stacked([getattr(getattr(e, s), f) for e in episodes], f"{s}.{f}") for f in ("x", "y")))
            for s in ("support", "query")
        ]
        return cls(sets[0], sets[1], tuple(e.info for e in episodes))

    def __len__(self) -> int:
        return len(self.support.x)

    def __getitem__(self, i: int) -> Episode:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        pick = [Examples(s.x[i], s.y[i]) for s in (self.support, self.query)]
        return Episode(pick[0], pick[1], self.info[i] if self.info else {})

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> EpisodeBatch:
        """The same batch on ``device``; floating-point tensors in ``dtype`` if one is given."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, dtype if dtype is not None and t.is_floating_point() else None, non_blocking=True)

        return self._with(move)

    def pinned(self) -> EpisodeBatch:
        """The same batch in memory of the CPU from which a GPU can take it while other work goes on."""
        return self._with(Tensor.pin_memory)

    def used_by(self, stream: torch.cuda.Stream) -> EpisodeBatch:
        """Itself; its memory on the GPU is not given away before what ``stream`` has been told by then is done."""
        for t in (*self.support, *self.query):
            t.record_stream(stream)
        return self

    def _with(self, change: Callable[[Tensor], Tensor]) -> EpisodeBatch:
        sets = [Examples(change(s.x), change(s.y)) for s in (self.support, self.query)]
        return EpisodeBatch(sets[0], sets[1], self.info)
