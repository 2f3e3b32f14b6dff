"""Meta-learning without derivatives of derivatives: walk towards where each task ends up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metadist.algorithms.base import TaskResults
from metadist.algorithms.losses import LossFunction
from metadist.algorithms.maml import MAML
from metadist.episode import EpisodeBatch, Examples
from metadist.inner import Tensors
from metadist.inner.adjoint import adapt


class Reptile(MAML):
    """Moves the initialisation towards the parameters adapted to each task (Nichol et al. 2018, algorithm 2).

    What it hands to the outer optimizer as the gradient is ``(theta_0 - theta_K) / (inner_lr * K)``, the
    mean gradient along the inner loop, so that rates keep their size when K changes. With plain SGD
    outside, ``outer.lr`` is the paper's ``epsilon * inner_lr * K``.

    Each inner step sees ``inner_batch_size`` support examples, which it takes in turn, as evenly over the
    classes as they are listed. As the paper does, give more ``shots`` for training than for evaluation
    (``evaluation.shots``). The query set only serves to watch.

    Args:
        inner_batch_size: support examples of an inner step in training; None takes all.
        others: as of :class:`MAML`.
    """

    exact = False

    def __init__(
        self,
        inner_lr: float = 0.01,
        inner_steps: int = 5,
        evaluation_inner_steps: int | None = None,
        inner_batch_size: int | None = None,
        loss: str | LossFunction = "auto",
        metric: str = "auto",
    ) -> None:
        super().__init__(inner_lr, inner_steps, evaluation_inner_steps, True, loss, metric)
        if inner_batch_size is not None and inner_batch_size < 1:
            raise ValueError(f"inner_batch_size must be at least 1, not {inner_batch_size}")
        self.inner_batch_size = inner_batch_size
        self.exact = False  # type: ignore[misc]

    def support_loss(self, shared: Any, fast: Tensors, support: Examples, k: int, evaluation: bool) -> Tensor:
        if not evaluation and self.inner_batch_size is not None:
            support = minibatch(support, self.inner_batch_size, k)
        return super().support_loss(shared, fast, support, k, evaluation)

    def meta_gradient(self, meta_params: Tensors, batch: EpisodeBatch) -> TaskResults:
        tasks = (batch.support, batch.query)
        gradient, (metrics, seen) = self.engine.sum_tasks(self._walk, (meta_params, self.constants()), tasks)
        return self.results(meta_params, batch, gradient, metrics, seen)

    def _walk(
        self, meta_params: Tensors, constants: Tensors, support: Examples, query: Examples
    ) -> tuple[Tensors, tuple[Any, Tensors]]:
        problem = self.problem(self.inner_steps)
        shared, state = adapt(problem, meta_params, constants, support)
        _, (metrics, seen) = problem.objective(shared, state, support, query, self.inner_steps)
        pace = self.inner_lr * self.inner_steps
        fast = state[0]
        return {k: (meta_params[k] - fast[k]).detach() / pace for k in fast}, (metrics, seen)


def minibatch(examples: Examples, size: int, k: int) -> Examples:
    """The ``k``-th batch of ``size`` examples, taken in turn from an order that goes round the set in even strides.

    A set that lists class after class is thus read a class at a time in each batch, as far as it goes.
    """
    n = len(examples.x)
    stride = max(1, n // size)
    order = [i for first in range(stride) for i in range(first, n, stride)]
    picked = torch.tensor([order[(k * size + j) % n] for j in range(size)], device=examples.x.device)
    return Examples(examples.x[picked], examples.y[picked])
