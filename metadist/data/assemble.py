"""Drawn images to episodes: turn, scale to [0, 1], label, and part support from query."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metadist.data.planes import planes
from metadist.data.samplers import Ints
from metadist.episode import Examples

_WHITE = np.float32(255)


def assemble(images: NDArray[np.uint8], turns: Ints, shots: int) -> tuple[Examples, Examples]:
    """Support and query sets of one episode, or of T.

    Args:
        images: uint8 ``[T * N * P, H, W]`` or ``[T * N * P, H, W, C]``, P of a class after one another, support
            before query; it may be turned in place.
        turns: quarter turns of each class, counter-clockwise, int64 ``[T, N]`` in 0..3; ``[N]`` for one episode.
        shots: examples of a class in the support set; the other P - shots are the query set.

    Returns:
        Support and query: x float32 ``[T, N * n, C, H, W]`` in [0, 1], y int64 ``[T, N * n]`` in 0..N-1, all of
        class 0 first; without the T where ``turns`` has none.
    """
    x = planes(images) if images.ndim == 4 else images[:, None]
    by_class = x.reshape(turns.size, -1, *x.shape[1:])  # [T * N, P, C, H, W]
    for quarter in (1, 2, 3):
        (which,) = (turns.ravel() == quarter).nonzero()
        if len(which):
            by_class[which] = _turned(by_class[which], quarter)
    return _part(by_class[:, :shots], turns.shape), _part(by_class[:, shots:], turns.shape)


def _turned(x: NDArray[np.uint8], quarter: int) -> NDArray[np.uint8]:
    """``np.rot90`` over the last two axes, without its checks."""
    if quarter == 2:
        return x[..., ::-1, ::-1]
    return x[..., ::-1].swapaxes(-1, -2) if quarter == 1 else x.swapaxes(-1, -2)[..., ::-1]


def _part(images: NDArray[np.uint8], classes: tuple[int, ...]) -> Examples:
    """Examples of uint8 ``[T * N, n, C, H, W]``, for ``classes`` (T, N) or (N,)."""
    *tasks, ways = classes
    each, shape = images.shape[1], images.shape[2:]
    # Torch's own memory: it is aligned alike each time, which sums of a vectorised kernel may depend on.
    x = torch.empty((*tasks, ways * each, *shape))
    np.divide(images, _WHITE, out=x.numpy().reshape(images.shape), dtype=np.float32)
    labels = _labels(ways, each)
    return Examples(x, labels.repeat(*tasks, 1) if tasks else labels.clone())


@lru_cache(maxsize=64)
def _labels(ways: int, each: int) -> Tensor:
    return torch.arange(ways).repeat_interleave(each)
