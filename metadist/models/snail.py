"""The network of SNAIL (Mishra et al. 2018): temporal convolutions and causal attention, interleaved."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalConv(nn.Module):
    """A convolution of size 2 over time that looks back: step t sees t and t - dilation.

    Written as two linear maps, since a step and an earlier one are all it has.

    Input ``[B, steps, inputs]``, output ``[B, steps, outputs]``.
    """

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.both = nn.Linear(2 * inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        earlier = F.pad(x, (0, 0, self.dilation, 0))[:, : x.shape[1]]
        return self.both(torch.cat([earlier, x], -1))


class DenseBlock(nn.Module):
    """A gated causal convolution whose result joins its input (Mishra et al. 2018, figure 2a).

    Input ``[B, steps, inputs]``, output ``[B, steps, inputs + filters]``.
    """

    def __init__(self, inputs: int, filters: int, dilation: int) -> None:
        super().__init__()
        self.conv = CausalConv(inputs, 2 * filters, dilation)

    def forward(self, x: Tensor) -> Tensor:
        values, gates = self.conv(x).chunk(2, -1)
        return torch.cat([x, torch.tanh(values) * torch.sigmoid(gates)], -1)


class TCBlock(nn.Module):
    """Dense blocks of dilations 1, 2, 4, ... until a step sees the whole sequence (figure 2b).

    Args:
        inputs: numbers of an input.
        filters: numbers that each dense block adds.
        steps: length of the sequence.
    """

    def __init__(self, inputs: int, filters: int, steps: int) -> None:
        super().__init__()
        count = max(1, math.ceil(math.log2(steps)))
        self.blocks = nn.Sequential(*(DenseBlock(inputs + i * filters, filters, 2**i) for i in range(count)))
        self.outputs = inputs + count * filters

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class AttentionBlock(nn.Module):
    """Attention of every step to itself and those before; what it reads joins its input (figure 2c).

    Input ``[B, steps, inputs]``, output ``[B, steps, inputs + values]``.
    """

    def __init__(self, inputs: int, keys: int, values: int) -> None:
        super().__init__()
        self.parts = keys, keys, values
        self.project = nn.Linear(inputs, 2 * keys + values)
        self.outputs = inputs + values

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).split(self.parts, -1)
        scores = query @ key.transpose(1, 2) / math.sqrt(self.parts[0])
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        read = torch.softmax(scores.masked_fill(later, -math.inf), -1) @ value
        return torch.cat([x, read], -1)


class SNAIL(nn.Module):
    """Attention, convolutions, attention, convolutions, attention, and a linear layer (section 5.1).

    Args:
        inputs: numbers of an input.
        outputs: numbers of an output.
        steps: length of the sequences.
        filters: numbers that each dense block adds; 128 in the paper.
        sizes: of keys and values of the three attention blocks, ``(64, 32), (256, 128), (512, 256)`` in the paper.

    Input ``[B, steps, inputs]``, output ``[B, steps, outputs]``.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        steps: int,
        filters: int = 128,
        sizes: tuple[tuple[int, int], ...] = ((64, 32), (256, 128), (512, 256)),
    ) -> None:
        super().__init__()
        first, *rest = sizes
        layers: list[TCBlock | AttentionBlock] = [AttentionBlock(inputs, *first)]
        for size in rest:
            layers.append(TCBlock(layers[-1].outputs, filters, steps))
            layers.append(AttentionBlock(layers[-1].outputs, *size))
        self.layers = nn.Sequential(*layers)
        self.to_outputs = nn.Linear(layers[-1].outputs, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.to_outputs(self.layers(inputs))
