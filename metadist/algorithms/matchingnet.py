"""Matching networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.algorithms.heads import one_hot
from metadist.algorithms.losses import LossFunction
from metadist.algorithms.protonet import MetricLearner
from metadist.episode import Examples
from metadist.inner import Tensors


class MatchingNet(MetricLearner):
    """Classifies by attention over the support set (Vinyals et al. 2016, equation 1).

    The probability of a class is the attention that the query's embedding pays to its examples: a softmax of
    cosine similarities. The output is the logarithm of these probabilities. The simple embeddings of
    the paper's section 2.1, without full context.

    Args:
        sharpness: what the similarities are multiplied with before the softmax; 1 in the paper, with which
            no probability can come near 1.
        loss, metric: as of :class:`~metadist.algorithms.maml.MAML`.
    """

    def __init__(self, sharpness: float = 10.0, loss: str | LossFunction = "auto", metric: str = "auto") -> None:
        super().__init__(loss, metric)
        if not sharpness > 0:
            raise ValueError(f"sharpness must be positive, not {sharpness}")
        self.sharpness = sharpness

    def adapt(self, meta_params: Tensors, support: Examples, *, evaluation: bool = False) -> Any:
        return {"params": meta_params, "keys": self.embed(meta_params, support.x, None, evaluation)}

    def predict(self, adapted: Any, support: Examples, x: Tensor, *, evaluation: bool = False) -> Tensor:
        """Logarithms of the classes' probabilities, ``[N, classes]``."""
        embedded = self.embed(adapted["params"], x, support.x, evaluation)
        similarity = F.normalize(embedded, dim=-1) @ F.normalize(adapted["keys"], dim=-1).T
        attention = torch.softmax(self.sharpness * similarity, dim=-1)
        return torch.log(attention @ one_hot(support.y, self.ways(support), attention) + 1e-9)
