"""Training pictures changed at random, so that a learner meets more classes and more drawings than there are.

Each choice is made after an episode is drawn, by random numbers of its own: the same classes and examples turn up
with and without. What changes a class as a whole (mirroring) makes new classes of the old ones, which is what
meta-learning is short of; what changes a picture (moving, turning, sizing) makes new examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from metadist.data.samplers import words_of
from metadist.episode import EpisodeBatch, Examples
from metadist.errors import ConfigError

_NUMBERS = 4  # of a picture: along, down, angle, size


@dataclass(frozen=True)
class Augmentation:
    """How far the pictures of an episode are changed. What is drawn is uniform, in both directions.

    Args:
        mirror: flip each class of a task left to right, or not, by the toss of a coin: all of its pictures alike, so
            that a mirrored class is a class of its own, as a turned one is (Santoro et al. 2016, section 4.1).
        shift: how far a picture is moved, along and down, as a part of its side, in [0, 1).
        rotation: how far it is turned, in degrees, in [0, 180].
        zoom: logarithm of the factor by which it grows or shrinks, in [0, 1].

    What a moved picture uncovers is filled with the pixels of its edge.
    """

    mirror: bool = False
    shift: float = 0.0
    rotation: float = 0.0
    zoom: float = 0.0

    @classmethod
    def of(cls, given: Augmentation | Mapping[str, Any] | None) -> Augmentation:
        """From the values of a config.

        Raises:
            ConfigError: if there is no such change or it is out of bounds.
        """
        if isinstance(given, Augmentation):
            return given
        known = [f.name for f in fields(cls)]
        for name in given or {}:
            if name not in known:
                raise ConfigError(f"tasks.augmentation.{name}", "is no change", f"choose from {', '.join(known)}")
        made = cls(**(given or {}))
        for name, limit in (("shift", 1.0), ("rotation", 180.0), ("zoom", 1.0)):
            value = getattr(made, name)
            if not 0 <= value <= limit:
                raise ConfigError(f"tasks.augmentation.{name}", f"is {value!r}", f"choose a number in [0, {limit:g}]")
        return made

    @property
    def moves(self) -> bool:
        """Whether single pictures are changed."""
        return bool(self.shift or self.rotation or self.zoom)

    def apply(self, batch: EpisodeBatch, seed: int, stream: str, numbers: Sequence[int]) -> EpisodeBatch:
        """The same episodes with their pictures changed; labels and order stay.

        Args:
            batch: T episodes of float32 pictures ``[T, examples, C, H, W]``, labels int64 ``[T, examples]`` in
                0..ways-1.
            seed, stream, numbers: of the episodes, of which the changes are functions.
        """
        support, query = batch.support, batch.query
        if self.mirror:
            flips = self._flips(int(support.y.max()) + 1, seed, stream, numbers)
            support, query = (Examples(_mirrored(s.x, flips.gather(1, s.y)), s.y) for s in (support, query))
        if self.moves:
            parts = [support.y.shape[1], query.y.shape[1]]
            units = _units(sum(parts), seed, stream, numbers).split(parts, 1)
            support, query = (Examples(self._moved(s.x, u), s.y) for s, u in zip((support, query), units, strict=True))
        return EpisodeBatch(support, query, batch.info)

    def _flips(self, ways: int, seed: int, stream: str, numbers: Sequence[int]) -> Tensor:
        """Whether each class is mirrored, bool ``[T, ways]``."""
        words = words_of(seed, f"{stream}/mirror", numbers, ways)
        return torch.from_numpy(words >> np.uint64(63) == 1)

    def _moved(self, x: Tensor, units: Tensor) -> Tensor:
        """Pictures ``[T, n, C, H, W]`` moved by ``units`` float32 ``[T, n, 4]`` in [-1, 1) of what is allowed."""
        pictures = x.flatten(0, 1)
        high, wide = pictures.shape[-2:]
        along, down, turn, size = (u[:, None, None] for u in units.flatten(0, 1).unbind(1))
        # A point of the new picture, from its centre in half sides, is looked up at a point of the old one.
        at_x = (torch.arange(wide) * 2 + 1.0) / wide - 1
        at_y = ((torch.arange(high) * 2 + 1.0) / high - 1)[:, None]
        at_x, at_y = at_x - 2 * self.shift * along, at_y - 2 * self.shift * down
        angle, scale = torch.deg2rad(self.rotation * turn), torch.exp(-self.zoom * size)
        cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
        points = torch.stack([cos * at_x - sin * (high / wide) * at_y, sin * (wide / high) * at_x + cos * at_y], -1)
        return grid_sample(pictures, points, "bilinear", "border", align_corners=False).view_as(x)


def _mirrored(x: Tensor, flips: Tensor) -> Tensor:
    """Pictures ``[T, n, C, H, W]``, those of ``flips`` bool ``[T, n]`` left to right."""
    return torch.where(flips[..., None, None, None], x.flip(-1), x)


def _units(examples: int, seed: int, stream: str, numbers: Sequence[int]) -> Tensor:
    """Numbers in [-1, 1), float32 ``[T, examples, 4]``."""
    words = words_of(seed, f"{stream}/augmentation", numbers, _NUMBERS * examples)
    unit = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return torch.from_numpy(unit.reshape(len(numbers), examples, _NUMBERS))
