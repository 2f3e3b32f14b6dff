"""One task's inner loop and its exact meta-gradient, one inner step's graph at a time.

Write the inner loop as ``theta[k+1] = step(phi, theta[k], support)`` and the objective as
``J(phi, theta[K], query)``. Its gradient needs no graph over the whole loop: run the loop, keep the
trajectory ``theta[0..K-1]``, then carry the adjoint ``v = dJ/dtheta`` backwards,
``v <- (d step / d theta)^T v``, recomputing one step at a time. For a gradient step
``theta - alpha g(theta)`` this is ``v <- v - alpha H v`` (Maclaurin et al. 2015 for the reversal; Finn et
al. 2017, equation 1, for the objective). Memory grows by one copy of the adapted parameters a step.

The last step's graph is still at hand when the adjoint starts, so it is used rather than recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp

from metadist.episode import Examples
from metadist.inner.functional import Tensors

Step = Callable[[Tensors, Tensors, Examples], Tensors]
"""``step(shared, fast, support) -> fast`` after one inner step."""

Objective = Callable[[Tensors, Tensors, Examples], tuple[Tensor, Any]]
"""``objective(shared, fast, query) -> (scalar loss, extra outputs)``."""


@dataclass(frozen=True)
class InnerProblem:
    """What an algorithm asks of the engine for one task.

    Args:
        step: one inner step from the *fast* parameters (adapted) and the *shared* ones (meta-learned but
            not adapted: learned rates, a frozen body). Differentiable unless ``first_order``.
        objective: the loss on the query set, and what else is wanted of the adapted model.
        steps: inner steps K, at least 1.
        first_order: treat every step as if its derivative with respect to ``fast`` were the identity
            (FOMAML, Finn et al. 2017, section 5.2); shared parameters then learn through the objective alone.
    """

    step: Step
    objective: Objective
    steps: int
    first_order: bool = False


def adapt(problem: InnerProblem, shared: Tensors, fast: Tensors, support: Examples) -> Tensors:
    """The adapted parameters after all inner steps."""
    for _ in range(problem.steps):
        fast = problem.step(shared, fast, support)
    return fast


def meta_gradient(
    problem: InnerProblem, shared: Tensors, fast: Tensors, support: Examples, query: Examples
) -> tuple[Tensors, Tensors, Any]:
    """Gradients of one task's objective with respect to ``shared`` and ``fast``, and the extra outputs."""
    trajectory: list[Tensors] = []
    back = None
    for k in range(problem.steps):
        trajectory.append(fast)
        if k == problem.steps - 1 and not problem.first_order:
            fast, back = vjp(lambda s, f: problem.step(s, f, support), shared, fast)  # type: ignore[misc]
        else:
            fast = problem.step(shared, fast, support)

    (g_shared, v), (_, extra) = grad_and_value(problem.objective, argnums=(0, 1), has_aux=True)(shared, fast, query)
    if problem.first_order:
        return g_shared, v, extra

    for k in reversed(range(problem.steps)):
        if back is None:
            _, back = vjp(lambda s, f: problem.step(s, f, support), shared, trajectory[k])  # type: ignore[misc]
        d_shared, v = back(v)
        g_shared = {name: g_shared[name] + d_shared[name] for name in g_shared}
        back = None
    return g_shared, v, extra


def loop_meta_gradient(
    problem: InnerProblem, shared: Tensors, fast: Tensors, support: Examples, query: Examples
) -> tuple[Tensors, Tensors, Any]:
    """The same by plain automatic differentiation through the whole loop: the oracle and the fallback.

    ``step`` must build its gradients with :func:`autograd_gradients`, which records them.
    """
    shared = {k: v.detach().requires_grad_() for k, v in shared.items()}
    start = {k: v.detach().requires_grad_() for k, v in fast.items()}
    current = start
    with torch.enable_grad():
        for _ in range(problem.steps):
            current = problem.step(shared, current, support)
            if problem.first_order:
                # The identity in place of each step's derivative: a new leaf that lands on the start.
                current = {k: start[k] + (current[k] - start[k]).detach() for k in start}
        loss, extra = problem.objective(shared, current, query)
        inputs = [*shared.values(), *start.values()]
        grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    n = len(shared)
    return dict(zip(shared, grads[:n], strict=True)), dict(zip(start, grads[n:], strict=True)), extra
