"""Matching networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.algorithms.heads import one_hot
from metadist.algorithms.losses import LossFunction
from metadist.algorithms.protonet import MetricLearner
from metadist.episode import Episode, Examples
from metadist.inner import Tensors
from metadist.models.context import KeysInContext, QueriesInContext


class InContext(nn.Module):
    """An embedding with what puts its outputs into the context of a support set."""

    def __init__(self, module: nn.Module, features: int, reads: int) -> None:
        super().__init__()
        self.module, self.keys, self.queries = module, KeysInContext(features), QueriesInContext(features, reads)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class MatchingNet(MetricLearner):
    """Classifies by attention over the support set (Vinyals et al. 2016, equation 1).

    The probability of a class is the attention that the query's embedding pays to its examples: a softmax of
    cosine similarities. The output is the logarithm of these probabilities.

    Args:
        sharpness: what the similarities are multiplied with before the softmax; 1 in the paper, with which
            no probability can come near 1.
        full_context: embeddings that see the whole support set, by LSTMs over it (section 2.1.2); its order
            then matters.
        reads: how often a query reads the support set for that.
        loss, metric: as of :class:`~metadist.algorithms.maml.MAML`.
    """

    def __init__(
        self,
        sharpness: float = 10.0,
        full_context: bool = False,
        reads: int = 3,
        loss: str | LossFunction = "auto",
        metric: str = "auto",
    ) -> None:
        super().__init__(loss, metric)
        if not sharpness > 0:
            raise ValueError(f"sharpness must be positive, not {sharpness}")
        if reads < 1:
            raise ValueError(f"reads must be at least 1, not {reads}")
        self.sharpness, self.full_context, self.reads = sharpness, full_context, reads

    def prepare(self, module: nn.Module, example: Episode) -> nn.Module:
        module = super().prepare(module, example)
        if not self.full_context:
            return module
        with torch.no_grad():
            features = module(example.support.x).flatten(1).shape[1]
        return InContext(module, features, self.reads)

    def adapt(self, meta_params: Tensors, support: Examples, *, evaluation: bool = False) -> Any:
        keys = self.embed(meta_params, support.x, None, evaluation)
        if self.full_context:
            keys = self.model.part("keys", meta_params, keys)
        return {"params": meta_params, "keys": keys}

    def predict(self, adapted: Any, support: Examples, x: Tensor, *, evaluation: bool = False) -> Tensor:
        """Logarithms of the classes' probabilities, ``[N, classes]``."""
        embedded = self.embed(adapted["params"], x, support.x, evaluation)
        if self.full_context:
            embedded = self.model.part("queries", adapted["params"], embedded, adapted["keys"])
        similarity = F.normalize(embedded, dim=-1) @ F.normalize(adapted["keys"], dim=-1).T
        attention = torch.softmax(self.sharpness * similarity, dim=-1)
        return torch.log(attention @ one_hot(support.y, self.ways(support), attention) + 1e-9)
