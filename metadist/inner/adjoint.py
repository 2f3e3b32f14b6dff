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

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.func import grad_and_value, vjp, vmap
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

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

    def step(k: int, shared: State, fast: State) -> State:
        return problem.step(shared, fast, support, k)

    def objective(k: int, shared: State, fast: State) -> tuple[Tensor, Any]:
        return problem.objective(shared, fast, support, query, k)

    (shared, start), back = vjp(lambda m: problem.start(m, constants, support), meta_params)  # type: ignore[misc]
    g_shared, v, extra = _through_steps(problem, shared, start, step, objective, lambda k, v: v)
    return back((g_shared, v))[0], extra


def meta_gradient_of_all(
    problem: InnerProblem, meta_params: Tensors, constants: Tensors, support: Examples, query: Examples
) -> tuple[Tensors, Any]:
    """The sum of :func:`meta_gradient` over T tasks computed together, and each one's extra outputs ``[T, ...]``.

    What is the same for all tasks, a body that no inner loop changes or a table of vectors, gets one derivative, that
    of the sum, and not one a task that would have to be added up.

    Args:
        support, query: of the tasks, ``[T, examples, ...]``.
    """
    begin = _Mapped(problem.start)
    started, back = vjp(lambda m: begin((m, None), (constants, None), (support, 0)), meta_params)  # type: ignore[misc]
    s_dims, dims = begin.dims[0], {0: begin.dims[1]}

    def step(k: int, shared: State, fast: State) -> State:
        moved = _Mapped(lambda s, f, support: problem.step(s, f, support, k))
        after = moved((shared, s_dims), (fast, dims[k]), (support, 0))
        dims[k + 1] = moved.dims
        return after

    def objective(k: int, shared: State, fast: State) -> tuple[Tensor, Any]:
        judge = vmap(lambda s, f, x, q: problem.objective(s, f, x, q, k), (s_dims, dims[k], 0, 0))
        losses, extra = judge(shared, fast, support, query)
        return losses.sum(), extra

    def unmoved(k: int, v: State) -> State:
        return _summed_to(dims[k], dims[k + 1], v)

    shared, start = started
    g_shared, v, extra = _through_steps(problem, shared, start, step, objective, unmoved)
    return back((g_shared, v))[0], extra


def _through_steps(
    problem: InnerProblem,
    shared: State,
    fast: State,
    step: Callable[[int, State, State], State],
    judged: Callable[[int, State, State], tuple[Tensor, Any]],
    unmoved: Callable[[int, State], State],
) -> tuple[State, State, Any]:
    """Gradients with respect to what is shared and to what is fast at the start, and the last extra outputs.

    Args:
        step: ``step(k, shared, fast)``, of one task or of all.
        judged: ``judged(k, shared, fast)``, the objective after ``k`` steps, likewise.
        unmoved: ``unmoved(k, v)``, the adjoint before step ``k`` where its derivative counts as the identity.
    """

    def objective(k: int, fast: State) -> tuple[State, State, Any]:
        slopes = grad_and_value(functools.partial(judged, k), argnums=(0, 1), has_aux=True)
        (g_shared, v), (_, extra) = slopes(shared, fast)
        return g_shared, v, extra

    trajectory: list[State] = []
    back = None
    for k in range(problem.steps):
        trajectory.append(fast)
        if k == problem.steps - 1 and not problem.first_order:
            fast, back = vjp(functools.partial(step, k), shared, fast)  # type: ignore[misc]
        else:
            fast = step(k, shared, fast)

    g_shared, v, extra = objective(problem.steps, fast)
    for k in reversed(range(problem.steps)):
        if problem.first_order:
            v = unmoved(k, v)
        else:
            if back is None:
                _, back = vjp(functools.partial(step, k), shared, trajectory[k])  # type: ignore[misc]
            d_shared, v = back(v)
            g_shared = _add(g_shared, d_shared)
            back = None
        if problem.every_step and k:
            d_shared, dv, _ = objective(k, trajectory[k])
            g_shared, v = _add(g_shared, d_shared), _add(v, dv)
    return g_shared, v, extra


_SOUND = frozenset(
    f"aten::{name}"
    for name in (
        "threshold_backward", "leaky_relu_backward", "elu_backward", "gelu_backward", "silu_backward", "tanh_backward",
        "sigmoid_backward", "softplus_backward", "_softmax_backward_data", "_log_softmax_backward_data",
        "nll_loss_backward", "mse_loss_backward", "smooth_l1_loss_backward", "huber_loss_backward",
        "convolution_backward", "embedding_dense_backward", "select_backward", "slice_backward", "unfold_backward",
    )
)  # fmt: skip
"""Derivatives of operators which torch differentiates rightly where it has mapped them over tasks before."""


class _Derivatives(TorchDispatchMode):
    """Within it, notes the derivatives that are computed, and operators that are neither torch's nor ours."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if ("backward" in name or not name.startswith(("aten::", "prim"))) and not name.startswith("metadist::"):
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def may_be_summed(problem: InnerProblem, meta_params: Tensors, constants: Tensors, support: Examples) -> bool:
    """Whether :func:`meta_gradient_of_all` is right for a problem, and of use.

    It differentiates what ``vmap`` has made of the inner step's own derivatives. Of BatchNorm and LayerNorm whose
    weights are each task's own torch 2.13 then gets the second derivative wrong, by 3 % in a small example. So an inner
    step may hold none but derivatives that are known to be right. That is a property of the model, not of its numbers:
    a run always computes the same way.

    Args:
        support: of one task.
    """
    derivatives = _Derivatives()
    with torch.no_grad(), derivatives:
        shared, fast = problem.start(meta_params, constants, support)
        derivatives.seen.clear()
        problem.step(shared, fast, support, 0)
    adapts_all = bool(derivatives.seen) and not pytree.tree_leaves(shared)  # then there is nothing to sum
    return derivatives.seen <= _SOUND and not adapts_all


class _Mapped:
    """A function of one task for all of them; what it gives that is the same for all of them stays one.

    Args:
        fn: of nested tensors.

    Called with pairs of an argument and where its tasks are, as ``vmap`` has it: 0, None, or a tree of these.
    Afterwards ``dims`` says where they are in what it gave.
    """

    def __init__(self, fn: Callable[..., State]) -> None:
        self._fn = fn
        self.dims: Any = None

    def __call__(self, *arguments: tuple[Any, Any]) -> State:
        same: dict[int, Tensor] = {}
        count, spec = 0, None

        def one(*args: Any) -> list[Tensor]:
            nonlocal count, spec
            leaves, spec = pytree.tree_flatten(self._fn(*args))
            count = len(leaves)
            same.update({i: leaf for i, leaf in enumerate(leaves) if not is_batchedtensor(leaf)})
            return [leaf for i, leaf in enumerate(leaves) if i not in same]

        mapped = iter(vmap(one, tuple(dims for _, dims in arguments))(*(argument for argument, _ in arguments)))
        assert spec is not None
        leaves = [same[i] if i in same else next(mapped) for i in range(count)]
        self.dims = pytree.tree_unflatten([None if i in same else 0 for i in range(count)], spec)
        return pytree.tree_unflatten(leaves, spec)


def _summed_to(dims: Any, given: Any, v: State) -> State:
    """Derivatives with respect to values of each task as those of what they all were before."""

    def one(leaf: Tensor, before: int | None, after: int | None) -> Tensor:
        return leaf.sum(0) if before is None and after == 0 else leaf

    return pytree.tree_map(one, v, dims, given)


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
