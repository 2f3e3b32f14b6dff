"""Recurrent cells written out in plain operators, which ``torch.func`` can vectorise and compile."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LSTMCell(nn.Module):
    """A long short-term memory cell (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000).

    ``torch.nn.LSTMCell`` has no batching rule; the forget gate's bias starts at 1 (Jozefowicz et al. 2015).

    Args:
        inputs: size of an input.
        hidden: size of the state.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.from_input, self.from_state = nn.Linear(inputs, 4 * hidden), nn.Linear(hidden, 4 * hidden, bias=False)
        bound = 1 / math.sqrt(hidden)
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)
        with torch.no_grad():
            self.from_input.bias[hidden : 2 * hidden] = 1.0

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The next (hidden, cell) state ``[N, hidden]`` each, for inputs ``[N, inputs]``."""
        return self.step(self.from_input(x), state)

    def step(self, projected: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The same from the input's projection ``from_input(x) [N, 4 * hidden]``, made for all steps at once."""
        h, c = state
        return lstm_update(projected + self.from_state(h), c)


def lstm_update(sums: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The next (hidden, cell) state ``[..., hidden]`` of an LSTM.

    Args:
        sums: of what comes in and of the state, ``[..., 4 * hidden]``: input, forget and output gate, candidate.
        cell: the cell state before, ``[..., hidden]``.
    """
    size = cell.shape[-1]
    gates, candidate = torch.sigmoid(sums[..., : 3 * size]), torch.tanh(sums[..., 3 * size :])
    put_in, forget, put_out = gates.chunk(3, -1)
    cell = forget * cell + put_in * candidate
    return put_out * torch.tanh(cell), cell
