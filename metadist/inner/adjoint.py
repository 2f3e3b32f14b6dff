"""One task's inner loop and its exact meta-gradient, one inner step's graph at a time.

Write the inner loop as ``theta[0] = start(meta)``, ``theta[k+1] = step(phi, theta[k], support, k)`` and
the objective as ``J(phi, theta[K], query)``. Its gradient needs no graph over the whole loop: run the
loop, keep the trajectory ``theta[0..K-1]``, then carry the adjoint ``v = dJ/dtheta`` backwards,
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
from torch.utils import _pytree as pytree

from metadist.episode import Examples
from metadist.inner.functional import Tensors

State = Any
"""Nested dicts of floating-point tensors."""

Start = Callable[[Tensors, Tensors, Examples], tuple[State, State]]
"""``start(meta_params, constants, support) -> (shared, fast)``."""

Step = Callable[[State, State, Examples, int], State]
"""``step(shared, fast, support, k) -> fast`` after inner step ``k``, counted from 0."""

Objective = Callable[[State, State, Examples, Examples, int], tuple[Tensor, Any]]
"""``objective(shared, fast, support, query, k) -> (scalar loss, extra outputs)`` after ``k`` steps."""


def all_fast(meta_params: Tensors, constants: Tensors, support: Examples) -> tuple[State, State]:
    """The start of a learner that adapts all it learns."""
    return constants, meta_params


@dataclass(frozen=True)
class InnerProblem:
    """What an algorithm asks of the engine for one task.

    Args:
        step: one inner step. *fast* is what the inner loop changes, *shared* what it only reads: learned
            rates, a frozen body, features computed once. Differentiable unless ``first_order``.
        objective: the loss on the query set, and what else is wanted of the adapted model.
        steps: inner steps K, at least 1.
        start: makes shared and fast from the meta-parameters, differentiably.
        first_order: treat every step as if its derivative with respect to ``fast`` were the identity
            (FOMAML, Finn et al. 2017, section 5.2); what is shared then learns through the objective alone.
        every_step: the objective is the sum of ``objective`` after each of the steps 1..K, not after the last alone.
    """

    step: Step
    objective: Objective
    steps: int
    start: Start = all_fast
    first_order: bool = False
    every_step: bool = False


def adapt(
    problem: InnerProblem,
    meta_params: Tensors,
    constants: Tensors,
    support: Examples,
    each: Callable[[int, State, State], None] | None = None,
) -> tuple[State, State]:
    """What is shared, and what is fast after all inner steps.

    Args:
        problem, meta_params, constants, support: as elsewhere.
        each: called with ``(k, shared, fast)`` after each step but the last, ``k`` from 1.
    """
    shared, fast = problem.start(meta_params, constants, support)
    for k in range(problem.steps):
        fast = problem.step(shared, fast, support, k)
        if each is not None and k + 1 < problem.steps:
            each(k + 1, shared, fast)
    return shared, fast


def meta_gradient(
    problem: InnerProblem, meta_params: Tensors, constants: Tensors, support: Examples, query: Examples
) -> tuple[Tensors, Any]:
    """The gradient of one task's objective with respect to ``meta_params``, and the last step's extra outputs."""
    (shared, start), back = vjp(lambda m: problem.start(m, constants, support), meta_params)  # type: ignore[misc]
    g_shared, v, extra = _through_steps(problem, shared, start, support, query)
    return back((g_shared, v))[0], extra


def _through_steps(
    problem: InnerProblem, shared: State, fast: State, support: Examples, query: Examples
) -> tuple[State, State, Any]:
    """Gradients with respect to what is shared and to what is fast at the start."""

    def objective(k: int, fast: State) -> tuple[State, State, Any]:
        def judged(s: State, f: State) -> tuple[Tensor, Any]:
            return problem.objective(s, f, support, query, k)

        (g_shared, v), (_, extra) = grad_and_value(judged, argnums=(0, 1), has_aux=True)(shared, fast)
        return g_shared, v, extra

    trajectory: list[State] = []
    back = None
    for k in range(problem.steps):
        trajectory.append(fast)
        if k == problem.steps - 1 and not problem.first_order:
            fast, back = vjp(lambda s, f: problem.step(s, f, support, k), shared, fast)  # type: ignore[misc]  # noqa: B023
        else:
            fast = problem.step(shared, fast, support, k)

    g_shared, v, extra = objective(problem.steps, fast)
    for k in reversed(range(problem.steps)):
        if not problem.first_order:
            if back is None:
                _, back = vjp(lambda s, f: problem.step(s, f, support, k), shared, trajectory[k])  # type: ignore[misc]  # noqa: B023
            d_shared, v = back(v)
            g_shared = _add(g_shared, d_shared)
            back = None
        if problem.every_step and k:
            d_shared, dv, _ = objective(k, trajectory[k])
            g_shared, v = _add(g_shared, d_shared), _add(v, dv)
    return g_shared, v, extra


def loop_meta_gradient(
    problem: InnerProblem, meta_params: Tensors, constants: Tensors, support: Examples, query: Examples
) -> tuple[Tensors, Any]:
    """The same by plain automatic differentiation through the whole loop: the oracle and the fallback.

    ``step`` must take its gradients by :func:`~metadist.inner.gradients.gradients`, which records them.
    """
    meta_params = {k: v.detach().requires_grad_() for k, v in meta_params.items()}
    with torch.enable_grad():
        shared, start = problem.start(meta_params, constants, support)
        fast, total, extra = start, torch.zeros(()), None
        for k in range(problem.steps):
            fast = problem.step(shared, fast, support, k)
            if problem.first_order:
                # The identity in place of each step's derivative: new values that land on the start.
                fast = pytree.tree_map(lambda a, b: a + (b - a).detach(), start, fast)
            if problem.every_step or k == problem.steps - 1:
                loss, extra = problem.objective(shared, fast, support, query, k + 1)
                total = total.to(loss) + loss
        values = torch.autograd.grad(total, list(meta_params.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(meta_params, values, strict=True)), extra


def _add(a: State, b: State) -> State:
    return pytree.tree_map(torch.add, a, b)
