"""How decoded images lie in memory: colours plane by plane, as a network wants them, whatever their shape says.

An image of a set has the shape ``[H, W, C]`` of the format, but is read once and used in many episodes, so the
planes are parted when it is decoded and each episode copies them in one go.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def planes(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images ``[n, H, W]`` or ``[n, H, W, C]`` seen channel by channel, ``[n, H, W]`` or ``[n, C, H, W]``: a view."""
    return images if images.ndim == 3 else images.transpose(0, 3, 1, 2)


def empty_images(n: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Room for n images, uint8 ``[n, *shape]``, colours plane by plane in memory as a network wants them."""
    if len(shape) < 3:
        return np.empty((n, *shape), dtype=np.uint8)
    h, w, c = shape
    return np.empty((n, c, h, w), dtype=np.uint8).transpose(0, 2, 3, 1)
