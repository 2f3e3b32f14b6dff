"""Embeddings that see the whole support set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metadist.models.recurrent import LSTMCell


class KeysInContext(nn.Module):
    """Support embeddings read in both directions (Vinyals et al. 2016, appendix A.2).

    ``g(x_i, S) = forward_i + backward_i + g'(x_i)``: the states of two LSTMs that go over the support set in
    its order and in reverse, added to the embedding.

    Args:
        features: size D of an embedding.

    Input and output ``[S, D]``.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.forwards, self.backwards = LSTMCell(features, features), LSTMCell(features, features)

    def forward(self, embedded: Tensor) -> Tensor:
        there, back = (
            _states(cell, rows) for cell, rows in ((self.forwards, embedded), (self.backwards, embedded.flip(0)))
        )
        return embedded + there + back.flip(0)


class QueriesInContext(nn.Module):
    """Query embeddings that read the support set several times (Vinyals et al. 2016, appendix A.1).

    In each of ``reads`` steps an LSTM takes the embedding and what it last read; it then reads the keys by attention:
    ``h_k = LSTM([f'(x), r_{k-1}], h_{k-1}) + f'(x)``, ``r_k = softmax(h_k g(S)^T) g(S)``. Each query for itself. (The
    paper writes ``r`` into the state rather than the input, which is the same but for a matrix.)

    Args:
        features: size D of an embedding.
        reads: steps.

    Inputs: queries ``[Q, D]`` and keys ``[S, D]``; output ``[Q, D]``.
    """

    def __init__(self, features: int, reads: int) -> None:
        super().__init__()
        self.reads = reads
        self.cell = LSTMCell(2 * features, features)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        h = c = read = torch.zeros_like(queries)
        for _ in range(self.reads):
            state, c = self.cell(torch.cat([queries, read], -1), (h, c))
            h = state + queries
            read = torch.softmax(h @ keys.T, -1) @ keys
        return h


def _states(cell: LSTMCell, rows: Tensor) -> Tensor:
    """The cell's states ``[S, D]`` along ``rows``."""
    h = c = rows.new_zeros(1, cell.hidden)
    states = []
    for i in range(len(rows)):
        h, c = cell(rows[i : i + 1], (h, c))
        states.append(h)
    return torch.cat(states)
