"""The four-block convolutional network of few-shot image classification."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, BatchNorm and ReLU, then a linear classifier.

    Vinyals et al. 2016 with 2x2 max pooling; Finn et al. 2017 use stride-2 convolutions in its place for
    Omniglot and average the last feature map over its positions. The convolutions carry no bias, which
    BatchNorm would take away again.

    Args:
        in_channels: channels of the pictures.
        out_features: classes; None leaves the classifier out, as an embedding.
        filters: channels of each block.
        downsample: ``stride`` (average of the last map) or ``max_pool`` (the last map flattened).
        image_size: height and width of the pictures, for ``max_pool``; at least 16 there.

    Input ``[N, in_channels, H, W]``, output ``[N, out_features]``, or ``[N, filters * positions]`` as an embedding.
    """

    def __init__(
        self,
        in_channels: int,
        out_features: int | None,
        filters: int = 64,
        downsample: str = "stride",
        image_size: tuple[int, int] = (28, 28),
    ) -> None:
        super().__init__()
        if downsample not in ("stride", "max_pool"):
            raise ValueError(f"downsample must be stride or max_pool, not {downsample!r}")
        self.downsample = downsample
        blocks = []
        for i in range(4):
            stride = 2 if downsample == "stride" else 1
            layers: OrderedDict[str, nn.Module] = OrderedDict(
                conv=nn.Conv2d(in_channels if i == 0 else filters, filters, 3, stride=stride, padding=1, bias=False),
                norm=nn.BatchNorm2d(filters, track_running_stats=False),
                relu=nn.ReLU(),
            )
            if downsample == "max_pool":
                layers["pool"] = nn.MaxPool2d(2)
            nn.init.xavier_uniform_(layers["conv"].weight)  # type: ignore[arg-type]
            blocks.append(nn.Sequential(layers))
        self.blocks = nn.Sequential(*blocks)
        positions = 1 if downsample == "stride" else (image_size[0] // 16) * (image_size[1] // 16)
        if positions < 1:
            raise ValueError(f"max_pool halves four times, so pictures of {image_size} are too small; use 16 or more")
        self.head = nn.Identity() if out_features is None else nn.Linear(filters * positions, out_features)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(x)
        features = features.mean((2, 3)) if self.downsample == "stride" else torch.flatten(features, 1)
        return self.head(features)
