"""What a few-shot learner is compared with on the same episodes: nearest centroids, and fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from metadist.algorithms import Algorithm
from metadist.algorithms.heads import class_means, find_head
from metadist.episode import PADDING, Episode, EpisodeBatch
from metadist.inner import Tensors

Features = Callable[[Tensors, Tensor, Tensor], Tensor]
"""``features(params, x, support_x)``, ``[N, D]``."""

RATE, STEPS = 1e-3, 50


def inputs_centroid(batch: EpisodeBatch, ways: int) -> Tensor:
    """Right answers ``[T, Q]`` of the class whose mean input is nearest (Euclidean)."""

    def one(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        return _nearest(sx.flatten(1), sy, qx.flatten(1), ways) == qy

    return vmap(one)(*batch.support, *batch.query)


def words_centroid(batch: EpisodeBatch, ways: int, weights: Tensor) -> Tensor:
    """Right answers ``[T, Q]`` of the class whose mean text is nearest, texts being their words (cosine).

    Args:
        batch: texts as whole numbers, ``[T, S, length]``.
        ways: classes of each task.
        weights: what each number counts, ``[vocabulary]``: its inverse document frequency, say; 0 for padding.
    """

    def vectors(x: Tensor) -> Tensor:
        there = torch.zeros(len(x), len(weights), dtype=weights.dtype).scatter_(1, x, 1.0)
        return F.normalize(there * weights, dim=-1)

    right = []
    for task in batch:
        (sx, sy), (qx, qy) = task.support, task.query
        means = F.normalize(class_means(vectors(sx), sy, ways), dim=-1)
        right.append((vectors(qx) @ means.T).argmax(-1) == qy)
    return torch.stack(right)


def inverse_document_frequency(texts: Tensor, vocabulary: int) -> Tensor:
    """``log((1 + n) / (1 + d))`` of each number that is in ``d`` of ``n`` texts ``[n, length]``; 0 for padding."""
    there = torch.zeros(vocabulary)
    for part in texts.split(1024):
        there += torch.zeros(len(part), vocabulary).scatter_(1, part, 1.0).sum(0)
    weights = torch.log((1 + len(texts)) / (1 + there))
    weights[PADDING] = 0
    return weights


def features_centroid(features: Features, params: Tensors, batch: EpisodeBatch, ways: int) -> Tensor:
    """Right answers ``[T, Q]`` of the class whose mean feature is nearest (Euclidean)."""

    def one(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        return _nearest(features(params, sx, sx), sy, features(params, qx, sx), ways) == qy

    with torch.no_grad():
        return vmap(one)(*batch.support, *batch.query)


def fine_tuned(
    features: Features, params: Tensors, batch: EpisodeBatch, ways: int, rate: float = RATE, steps: int = STEPS
) -> Tensor:
    """Right answers ``[T, Q]`` of a network with a new last layer, all of it fitted to the support set by Adam.

    Args:
        features: of the network without a last layer.
        params: where it sets out; the last layer begins at zero.
        batch: T tasks.
        ways: classes of each.
        rate, steps: of Adam (Kingma and Ba 2015), with its usual decay of moments.
    """
    tasks, like = len(batch), next(v for v in params.values() if v.is_floating_point())
    with torch.no_grad():
        width = features(params, batch.support.x[0], batch.support.x[0]).shape[-1]
    last = {"weight": like.new_zeros(tasks, width, ways), "bias": like.new_zeros(tasks, ways)}
    at = {**{f"body/{k}": v.detach().expand(tasks, *v.shape).clone() for k, v in params.items()}, **last}

    def scores(own: Tensors, x: Tensor, support_x: Tensor) -> Tensor:
        body = {k.removeprefix("body/"): v for k, v in own.items() if k.startswith("body/")}
        return features(body, x, support_x) @ own["weight"] + own["bias"]

    def loss(own: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(scores(own, x, x), y)

    slope = vmap(grad(loss))
    optimizer = torch.optim.Adam(list(at.values()), lr=rate)
    for _ in range(steps):
        found = slope(at, *batch.support)
        for name, value in at.items():
            value.grad = found[name].detach()
        optimizer.step()
    with torch.no_grad():
        return vmap(lambda own, qx, qy, sx: scores(own, qx, sx).argmax(-1) == qy)(at, *batch.query, batch.support.x)


def features_of(learner: Algorithm, example: Episode) -> tuple[Features, Sequence[str]] | None:
    """The learner's network without its last layer, and the names of its parameters; None if it is not in two parts."""
    model = learner.model
    if learner.wants == "features":

        def whole(params: Tensors, x: Tensor, support_x: Tensor) -> Tensor:
            return model(params, x, reference=support_x, evaluation=True).flatten(1)

        return whole, [*model.initial_params(), *model.statistics]
    try:
        head = find_head(model.module, getattr(learner, "head", None), example)
    except ValueError:
        return None
    model.cut_at(head)

    def body(params: Tensors, x: Tensor, support_x: Tensor) -> Tensor:
        return model.features(params, x, reference=support_x, evaluation=True).flatten(1)

    return body, [k for k in (*model.initial_params(), *model.statistics) if k not in model.head_params]


def _nearest(support: Tensor, y: Tensor, query: Tensor, ways: int) -> Tensor:
    return torch.cdist(query[None], class_means(support, y, ways)[None])[0].argmin(-1)
