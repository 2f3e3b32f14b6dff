"""No network at all: the inputs as features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Flatten(nn.Module):
    """Each input as one vector, pictures averaged down first if a size is given.

    Args:
        size: height and width to which pictures ``[N, C, H, W]`` are brought; None leaves inputs as they are.

    Input ``[N, ...]``, output ``[N, numbers of an input]``.
    """

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None:
            x = F.adaptive_avg_pool2d(x, (self.size, self.size))
        return torch.flatten(x, 1)
