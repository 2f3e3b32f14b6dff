"""What a run's tasks look like, kept with its checkpoints: what was learned can be used where the data are not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from metadist.episode import Episode, Examples

_MOST_NUMBERS = 1 << 31
"""Of the inputs of an episode: a checkpoint that asks for more room was not written by a run."""


@dataclass(frozen=True)
class Inputs:
    """The shape of an episode.

    Args:
        x, y: shape of one input and of one target.
        x_dtype, y_dtype: theirs, as torch names them: ``float32``, ``int64``.
        support, query: examples of each set.
        classes: one more than the largest target, of whole numbers; None for others.
        vocabulary: numbers that inputs of whole numbers are made of; None for others.
    """

    x: tuple[int, ...]
    y: tuple[int, ...]
    x_dtype: str
    y_dtype: str
    support: int
    query: int
    classes: int | None = None
    vocabulary: int | None = None

    @classmethod
    def of(cls, episode: Episode, vocabulary: int | None) -> Inputs:
        """Those of an episode."""
        x, y = episode.support
        classes = None if y.is_floating_point() else int(torch.cat([y, episode.query.y]).max()) + 1
        x_dtype, y_dtype = (str(t.dtype).removeprefix("torch.") for t in (x, y))
        shapes = tuple(x.shape[1:]), tuple(y.shape[1:])
        return cls(*shapes, x_dtype, y_dtype, len(x), len(episode.query.x), classes, vocabulary)

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Inputs:
        """From what :meth:`told` made.

        Raises:
            TypeError, ValueError: it is something else.
        """
        made = cls(**{**told, "x": tuple(told["x"]), "y": tuple(told["y"])})
        for name in (made.x_dtype, made.y_dtype):
            if not isinstance(getattr(torch, name, None), torch.dtype):
                raise ValueError(f"{name!r} is no dtype")
        counts = [*made.x, *made.y, made.support, made.query]
        counts += [n for n in (made.classes, made.vocabulary) if n is not None]
        if any(type(n) is not int or n < 1 for n in counts):
            raise ValueError(f"{counts} are no sizes")
        if math.prod(made.x) * (made.support + made.query) > _MOST_NUMBERS or math.prod(made.y) > _MOST_NUMBERS:
            raise ValueError(f"inputs of shape {list(made.x)}, which no run has")
        return made

    def told(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @property
    def pictures(self) -> bool:
        """Whether inputs are pictures, ``[1 or 3, H, W]``."""
        return len(self.x) == 3 and self.x[0] in (1, 3) and self.x_dtype.startswith("float")

    def example(self) -> Episode:
        """An episode of this shape; its numbers mean nothing."""
        return Episode(self._examples(self.support), self._examples(self.query))

    def _examples(self, count: int) -> Examples:
        x = _numbers((count, *self.x), self.x_dtype, self.vocabulary)
        return Examples(x, _numbers((count, *self.y), self.y_dtype, self.classes))


def _numbers(shape: tuple[int, ...], dtype: str, below: int | None) -> Tensor:
    """All different as far as can be, so that no two outputs are equal by chance; whole ones begin with the largest."""
    count = math.prod(shape)
    kind: torch.dtype = getattr(torch, dtype)
    if kind.is_floating_point:
        return torch.linspace(0, 1, count, dtype=kind).reshape(shape)
    below = below or 2
    return ((below - 1 - torch.arange(count)) % below).to(kind).reshape(shape)
