"""Drawn images to episodes: turn, scale to [0, 1], label, and part support from query."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from metadist.data.samplers import Ints
from metadist.episode import Examples


def assemble(images: NDArray[np.uint8], turns: Ints, shots: int) -> tuple[Examples, Examples]:
    """Support and query sets of T episodes.

    Args:
        images: uint8 ``[T, N, P, H, W]`` or ``[T, N, P, H, W, C]``, support before query within a class; it is
            turned in place.
        turns: quarter turns of each class, counter-clockwise, int64 ``[T, N]`` in 0..3.
        shots: examples of a class in the support set; the other P - shots are the query set.

    Returns:
        Support and query: x float32 ``[T, N * n, C, H, W]`` in [0, 1], y int64 ``[T, N * n]`` in 0..N-1, all of
        class 0 first.
    """
    t, n, p = images.shape[:3]
    flat = images.reshape(t * n, *images.shape[2:])
    for quarter in np.unique(turns[turns > 0]):
        which = np.flatnonzero(turns.ravel() == quarter)
        flat[which] = np.rot90(flat[which], int(quarter), axes=(2, 3))
    x = torch.from_numpy(flat.reshape(images.shape))
    x = x.unsqueeze(3) if images.ndim == 5 else x.movedim(-1, 3)
    labels = torch.arange(n)

    def part(a: int, z: int) -> Examples:
        scaled = x[:, :, a:z].to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
        y = labels.repeat_interleave(z - a).expand(t, -1).contiguous()
        return Examples(scaled.reshape(t, n * (z - a), *x.shape[3:]), y)

    return part(0, shots), part(shots, p)
