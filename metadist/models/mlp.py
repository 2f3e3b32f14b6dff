"""The multi-layer perceptron."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them; 1-40-40-1 is the sinusoid network of Finn et al. 2017.

    Args:
        in_features: numbers of an input, all its dimensions together.
        out_features: numbers of an output; None ends with the last hidden layer, as an embedding.
        hidden: sizes of the hidden layers; none gives a linear model.

    Input ``[N, ...]`` with ``in_features`` numbers an example, output ``[N, out_features]``.
    """

    def __init__(self, in_features: int, out_features: int | None, hidden: Sequence[int] = (40, 40)) -> None:
        super().__init__()
        sizes = [in_features, *hidden, *([] if out_features is None else [out_features])]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])  # no ReLU after the last

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.flatten(x, 1))
