"""Meta-gradients from where the inner loop ends, not from the way it took."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metadist.algorithms.base import TaskResults
from metadist.algorithms.losses import LossFunction
from metadist.algorithms.maml import MAML
from metadist.episode import EpisodeBatch, Examples
from metadist.inner import Tensors, curvature, gradients
from metadist.inner.adjoint import adapt
from metadist.inner.optimizers import InnerOptimizer

RESIDUAL = "cg_residual"


class IMAML(MAML):
    """Implicit MAML (Rajeswaran et al. 2019, algorithm 2).

    The inner loop goes down ``L_support(phi) + (proximity / 2) |phi - theta|^2`` by gradient steps. At its
    minimum ``phi*`` the meta-gradient is ``(I + H / proximity)^-1 grad L_query(phi*)`` with ``H`` the Hessian of the
    support loss (lemma 1), which ``cg_steps`` of conjugate gradient solve without the way that led to
    ``phi*``: memory does not grow with the inner steps. How well, the metric ``cg_residual`` says: the norm of
    what is left of the equation, relative to its right side.

    Args:
        inner_lr: step size of the inner loop.
        inner_steps: its steps in training; the closer they come to the minimum, the truer the gradient.
        evaluation_inner_steps: its steps in evaluation and use.
        proximity: lambda, the pull towards the initialisation.
        cg_steps: steps of conjugate gradient.
        loss, metric: as of :class:`MAML`.
    """

    exact = False

    def __init__(
        self,
        inner_lr: float = 0.1,
        inner_steps: int = 16,
        evaluation_inner_steps: int | None = None,
        proximity: float = 2.0,
        cg_steps: int = 5,
        loss: str | LossFunction = "auto",
        metric: str = "auto",
        inner_optimizer: InnerOptimizer | None = None,
    ) -> None:
        super().__init__(inner_lr, inner_steps, evaluation_inner_steps, False, loss, metric, inner_optimizer)
        if self.inner_optimizer.learned:
            raise ValueError(
                "inner_optimizer.learned must be false: the implicit gradient does not depend on the way to the minimum"
            )
        if not proximity > 0:
            raise ValueError(f"proximity must be positive, not {proximity}")
        if cg_steps < 1:
            raise ValueError(f"cg_steps must be at least 1, not {cg_steps}")
        self.proximity, self.cg_steps = proximity, cg_steps
        self.exact = False  # type: ignore[misc]

    def start(
        self, meta_params: Tensors, constants: Tensors, support: Examples, evaluation: bool
    ) -> tuple[dict[str, Any], Tensors]:
        shared, fast = super().start(meta_params, constants, support, evaluation)
        shared["anchor"] = fast
        return shared, fast

    def slope(self, shared: Any, fast: Tensors, gradient: Tensors) -> Tensors:
        return {k: gradient[k] + self.proximity * (fast[k] - shared["anchor"][k]) for k in fast}

    def meta_gradient(self, meta_params: Tensors, batch: EpisodeBatch) -> TaskResults:
        tasks = (batch.support, batch.query)
        gradient, (metrics, seen) = self.engine.sum_tasks(self._implicit, (meta_params, self.constants()), tasks)
        return self.results(meta_params, batch, gradient, metrics, seen)

    def _implicit(
        self, meta_params: Tensors, constants: Tensors, support: Examples, query: Examples
    ) -> tuple[Tensors, tuple[Any, Tensors]]:
        problem = self.problem(self.inner_steps)
        shared, (fast, seen, _) = adapt(problem, meta_params, constants, support)
        fast = {k: v.detach() for k, v in fast.items()}
        _, (metrics, seen) = problem.objective(shared, (fast, seen, {}), support, query, self.inner_steps)
        right = gradients(lambda f: problem.objective(shared, (f, seen, {}), support, query, self.inner_steps)[0], fast)
        hessian = curvature(lambda f: self.support_loss(shared, f, support, self.inner_steps, False), fast)

        def operator(v: Tensors) -> Tensors:
            bent = hessian(v)
            return {k: v[k] + bent[k] / self.proximity for k in v}

        solved, residual = conjugate_gradient(operator, right, self.cg_steps)
        return {k: v.detach() for k, v in solved.items()}, ({**metrics, RESIDUAL: residual}, seen)


def conjugate_gradient(operator: Any, right: Tensors, steps: int) -> tuple[Tensors, Tensor]:
    """Solves ``operator(x) = right`` for a symmetric positive definite operator (Hestenes and Stiefel 1952).

    Args:
        operator: maps tensors by name to tensors by name, linearly.
        right: the right side.
        steps: how many; the start is ``x = right``.

    Returns:
        ``x``, and the norm of ``right - operator(x)`` relative to that of ``right``.
    """
    x = right
    ax = operator(x)
    r = {k: right[k] - ax[k] for k in right}
    p, rr, size = r, _dot(r, r), _dot(right, right)
    tiny = torch.finfo(rr.dtype).tiny
    for _ in range(steps):
        ap = operator(p)
        bend = _dot(p, ap)
        # No step along a direction that does not bend upwards, nor once the residual is nought.
        alpha = torch.where(bend > 0, rr / bend.clamp(min=tiny), torch.zeros_like(rr))
        x = {k: x[k] + alpha * p[k] for k in x}
        r = {k: r[k] - alpha * ap[k] for k in r}
        new = _dot(r, r)
        beta = new / rr.clamp(min=tiny)
        p = {k: r[k] + beta * p[k] for k in r}
        rr = new
    return x, torch.sqrt(rr / size.clamp(min=tiny))


def _dot(a: Tensors, b: Tensors) -> Tensor:
    return torch.stack([(a[k] * b[k]).sum() for k in a]).sum()
