"""The twelve-layer residual network of few-shot image classification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ResNet12(nn.Module):
    """Four residual blocks of three 3x3 convolutions, each halving its input, and the mean of the last map.

    Lee et al. 2019 ("Meta-learning with differentiable convex optimization", section 4.1) with widths 64, 160, 320,
    640; Oreshkin et al. 2018 with 64, 128, 256, 512. Convolutions carry no bias, which BatchNorm would take away again.

    Args:
        in_channels: channels of the pictures.
        out_features: classes; None leaves the classifier out, as an embedding.
        widths: channels of each block.
        slope: of LeakyReLU below zero.

    Input ``[N, in_channels, H, W]`` with H and W at least 16, output ``[N, out_features]``, or ``[N, widths[-1]]`` as
    an embedding.
    """

    def __init__(
        self,
        in_channels: int,
        out_features: int | None,
        widths: Sequence[int] = (64, 160, 320, 640),
        slope: float = 0.1,
    ) -> None:
        super().__init__()
        sizes = [in_channels, *widths]
        self.blocks = nn.Sequential(*(_Block(a, b, slope) for a, b in zip(sizes, sizes[1:], strict=False)))
        self.head = nn.Identity() if out_features is None else nn.Linear(sizes[-1], out_features)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=slope, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, slope: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [
                nn.Conv2d(inputs if i == 0 else outputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs, track_running_stats=False),
                *([nn.LeakyReLU(slope)] if i < 2 else []),
            ]
        self.main = nn.Sequential(*layers)
        self.short = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs, track_running_stats=False)
        )
        self.end = nn.Sequential(nn.LeakyReLU(slope), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.add(self.main(x), self.short(x)))
