"""A model of ratings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.episode import PADDING
from metadist.models.mlp import MLP


class RatingModel(nn.Module):
    """The vectors of what a row names, summed, and a perceptron that decides (Lee et al. 2019, section 3.1).

    MeLU adapts the decision to a user and not the vectors: ``algorithm: {type: maml, adapted: ["decide*"]}``. Here each
    number also has a value of its own that is added to the decision, as the biases of factor models are (Koren et al.
    2009, equation 3), and the mean of the ratings stands before all.

    Args:
        vocabulary: numbers that a row may hold; 0 is padding.
        embedding: numbers of a vector.
        hidden: sizes of the perceptron's layers.
        mean: what is said of an item that nothing is known of.

    Input int64 ``[N, columns]``, output ``[N, 1]``.
    """

    def __init__(
        self, vocabulary: int, embedding: int = 32, hidden: Sequence[int] = (64, 64), mean: float = 0.0
    ) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(vocabulary, embedding) * embedding**-0.5)
        self.values = nn.Parameter(torch.zeros(vocabulary, 1))
        self.mean = nn.Parameter(torch.tensor([float(mean)]))
        self.decide = MLP(embedding, 1, hidden)

    def forward(self, x: Tensor) -> Tensor:
        there = (x != PADDING).to(self.vectors.dtype)[..., None]
        summed = (F.embedding(x, self.vectors) * there).sum(1)
        own = (F.embedding(x, self.values) * there).sum(1)
        return self.mean + own + self.decide(summed)
