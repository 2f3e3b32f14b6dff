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
from metadist.inner.optimizers import InnerOptimizer


class Reptile(MAML):
    """Moves the initialisation towards the parameters adapted to each task (Nichol et al. 2018, algorithm 2).

    What it hands to the outer optimizer as the gradient is ``(theta_0 - theta_K) / (inner_lr * K)``, the
    mean direction of the inner steps, so that rates keep their size when K changes. With plain SGD
    outside, ``outer.lr`` is the paper's ``epsilon * inner_lr * K``.

    Each inner step sees ``inner_batch_size`` support examples, in turn and evenly over the classes. As the paper
    does, give more ``shots`` for training than for evaluation (``evaluation.shots``). The query set only serves to
    watch.

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
        inner_optimizer: InnerOptimizer | None = None,
    ) -> None:
        super().__init__(inner_lr, inner_steps, evaluation_inner_steps, True, loss, metric, inner_optimizer)
        if self.inner_optimizer.learned:
            raise ValueError("inner_optimizer.learned must be false: reptile has no gradient with respect to it")
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
    """The ``k``-th batch of ``size`` examples, spread evenly over the set; the next batch is one place further on.

    Of a set that lists class after class, each batch thus holds as many of one class as of another, as far as that
    goes, and batches go through all examples before any comes again, if ``size`` divides their number.
    """
    n = len(examples.x)
    size = min(size, n)
    shift = k % -(-n // size)
    picked = torch.tensor([(j * n // size + shift) % n for j in range(size)], device=examples.x.device)
    return Examples(examples.x[picked], examples.y[picked])
