"""Model-agnostic meta-learning."""

from __future__ import annotations

from torch import Tensor

from metadist.algorithms.base import Algorithm, TaskResults
from metadist.algorithms.losses import LossFunction
from metadist.episode import EpisodeBatch, Examples
from metadist.inner import InnerProblem, Tensors, gradients
from metadist.inner.adjoint import adapt


class MAML(Algorithm):
    """An initialisation from which a few gradient steps solve a task (Finn et al. 2017, algorithm 1).

    With ``theta_0`` the initialisation and ``theta_{k+1} = theta_k - inner_lr * grad L_support(theta_k)``,
    the meta-gradient is that of ``L_query(theta_K)`` with respect to ``theta_0``, exact to second order.

    Args:
        inner_lr: step size of the inner loop.
        inner_steps: its steps K in training.
        evaluation_inner_steps: its steps in evaluation and use; None takes ``inner_steps``.
        first_order: leave out the second derivatives (section 5.2 of the paper).
        loss: ``auto``, ``cross_entropy``, ``mse`` or a function of (output, target).
    """

    def __init__(
        self,
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        evaluation_inner_steps: int | None = None,
        first_order: bool = False,
        loss: str | LossFunction = "auto",
    ) -> None:
        if not inner_lr > 0:
            raise ValueError(f"inner_lr must be positive, not {inner_lr}")
        for name, steps in (("inner_steps", inner_steps), ("evaluation_inner_steps", evaluation_inner_steps)):
            if steps is not None and steps < 1:
                raise ValueError(f"{name} must be at least 1, not {steps}")
        self.inner_lr, self.inner_steps, self.first_order, self.loss = inner_lr, inner_steps, first_order, loss
        self.evaluation_inner_steps = inner_steps if evaluation_inner_steps is None else evaluation_inner_steps
        self.exact = not first_order  # type: ignore[misc]
        self._problems: dict[int, InnerProblem] = {}

    def meta_gradient(self, meta_params: Tensors, batch: EpisodeBatch) -> TaskResults:
        results = self.engine.meta_gradient(self._problem(self.inner_steps), {}, meta_params, batch)
        return TaskResults(results.fast, {**results.extra, **self.before_adaptation(meta_params, batch)})

    def adapt(self, meta_params: Tensors, support: Examples, *, evaluation: bool = False) -> Tensors:
        steps = self.evaluation_inner_steps if evaluation else self.inner_steps
        return adapt(self._problem(steps), {}, meta_params, support)

    def _problem(self, steps: int) -> InnerProblem:
        if steps not in self._problems:
            # One object for each number of steps: the engine keeps what it compiled for it.
            self._problems[steps] = self._make_problem(steps)
        return self._problems[steps]

    def _make_problem(self, steps: int) -> InnerProblem:
        def step(shared: Tensors, fast: Tensors, support: Examples) -> Tensors:
            gradient = gradients(lambda p: self.objective.loss(self.model(p, support.x), support.y), fast)
            return {k: fast[k] - self.inner_lr * gradient[k] for k in fast}

        def objective(shared: Tensors, fast: Tensors, query: Examples) -> tuple[Tensor, Tensors]:
            return self.query_objective(fast, query)

        return InnerProblem(step, objective, steps, self.first_order)
