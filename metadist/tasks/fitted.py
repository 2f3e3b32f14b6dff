"""Episodes of pictures brought to another size and to grey or colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.episode import Episode, EpisodeBatch, Examples
from metadist.seeding import Rng
from metadist.tasks.base import TaskSource

_LUMA = (0.299, 0.587, 0.114)


class Fitted(TaskSource):
    """The episodes of another source, with pictures as a model wants them.

    Colours become grey by their luma (ITU-R BT.601), grey becomes three equal channels, and the size is changed by
    bilinear interpolation that averages where it shrinks. Ink stays as it is, dark on light or light on dark.

    Args:
        source: gives pictures ``[S, 1 or 3, H, W]`` in [0, 1].
        channels: 1 or 3.
        size: height and width.
    """

    def __init__(self, source: TaskSource, channels: int, size: tuple[int, int]) -> None:
        self.source, self.channels, self.size = source, channels, size

    def sample(self, rng: Rng) -> Episode:
        """One episode of the source, fitted."""
        return self.episodes(rng.seed, rng.stream, [rng.index])[0]

    def split(self, name: str) -> Fitted:
        """That of the source, fitted."""
        return Fitted(self.source.split(name), self.channels, self.size)

    def episodes(self, seed: int, stream: str, numbers: Sequence[int]) -> EpisodeBatch:
        """Those of the source, fitted."""
        batch = self.source.episodes(seed, stream, numbers)
        support, query = (Examples(self._fit(x), y) for x, y in (batch.support, batch.query))
        return EpisodeBatch(support, query, batch.info)

    def _fit(self, x: Tensor) -> Tensor:
        """Pictures ``[..., C, H, W]``."""
        if x.shape[-3] == 3 and self.channels == 1:
            x = (x * torch.tensor(_LUMA, dtype=x.dtype).view(3, 1, 1)).sum(-3, keepdim=True)
        elif x.shape[-3] == 1 and self.channels == 3:
            x = x.expand(*x.shape[:-3], 3, *x.shape[-2:]).contiguous()
        if tuple(x.shape[-2:]) == self.size:
            return x
        flat = F.interpolate(x.flatten(0, -4), self.size, mode="bilinear", antialias=True, align_corners=False)
        return flat.clamp(0, 1).view(*x.shape[:-2], *self.size)

    def describe(self) -> dict[str, Any]:
        """What the source says, and how its pictures are fitted."""
        return {**self.source.describe(), "fitted": [self.channels, *self.size]}

    def close(self) -> None:
        """Closes the source."""
        self.source.close()
