"""Prototypical networks."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.algorithms.base import Algorithm
from metadist.algorithms.heads import class_means, one_hot, require_classes
from metadist.algorithms.losses import LossFunction
from metadist.episode import Episode, Examples
from metadist.inner import Tensors


class MetricLearner(Algorithm):
    """What learners have in common that compare the embeddings of query and support.

    The model is an embedding: its output for an example, flattened. Wants whole-number targets.
    """

    any_ways = True
    wants = "features"

    def __init__(self, loss: str | LossFunction = "auto", metric: str = "auto") -> None:
        self.loss, self.metric = loss, metric

    def prepare(self, module: nn.Module, example: Episode) -> nn.Module:
        require_classes(type(self).__name__, example)
        return module

    def reads_only(self, name: str) -> bool:
        return True

    def predict_unadapted(self, meta_params: Tensors, support: Examples, x: Tensor, *, evaluation: bool) -> Tensor:
        """Without support one class is as good as another: the same score for all."""
        like = next(iter(meta_params.values()))
        return like.new_zeros(len(x), self.ways(support))

    def ways(self, support: Examples) -> int:
        """Classes an episode can have at most: as many as it has support examples."""
        return len(support.y)

    def embed(self, params: Tensors, x: Tensor, reference: Tensor | None, evaluation: bool) -> Tensor:
        """Embeddings ``[N, D]``."""
        return self.model(params, x, reference=reference, evaluation=evaluation).flatten(1)


class ProtoNet(MetricLearner):
    """Scores a class by the distance to the mean embedding of its examples (Snell et al. 2017, equation 2).

    Args:
        distance: ``euclidean`` (squared, as the paper finds best) or ``cosine``.
        loss, metric: as of :class:`~metadist.algorithms.maml.MAML`.
    """

    def __init__(
        self,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        loss: str | LossFunction = "auto",
        metric: str = "auto",
    ) -> None:
        super().__init__(loss, metric)
        if distance not in ("euclidean", "cosine"):
            raise ValueError(f"distance must be euclidean or cosine, not {distance!r}")
        self.distance = distance

    def adapt(self, meta_params: Tensors, support: Examples, *, evaluation: bool = False) -> Any:
        embedded = self.embed(meta_params, support.x, None, evaluation)
        return {"params": meta_params, "prototypes": class_means(embedded, support.y, self.ways(support))}

    def predict(self, adapted: Any, support: Examples, x: Tensor, *, evaluation: bool = False) -> Tensor:
        """Scores ``[N, classes]``; of a class that the support set lacks, the lowest there is."""
        embedded = self.embed(adapted["params"], x, support.x, evaluation)
        prototypes = adapted["prototypes"]
        if self.distance == "cosine":
            scores = F.normalize(embedded, dim=-1) @ F.normalize(prototypes, dim=-1).T
        else:
            scores = -((embedded[:, None] - prototypes[None]) ** 2).sum(-1)
        return masked(scores, support.y)


def masked(scores: Tensor, y: Tensor) -> Tensor:
    """``scores [N, classes]`` with the lowest number where no example of ``y [S]`` is of the class."""
    there = one_hot(y, scores.shape[-1], scores).any(0)
    return torch.where(there, scores, torch.full_like(scores, -1e9))
