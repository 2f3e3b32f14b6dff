"""Derivatives inside an inner step, in a form that whichever engine runs it can differentiate again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp

from metadist.inner.functional import Tensors

_recorded: ContextVar[bool] = ContextVar("recorded", default=False)


def gradients(loss: Callable[[Tensors], Tensor], params: Tensors) -> Tensors:
    """The gradient of the scalar ``loss(params)`` with respect to every tensor of ``params``.

    An algorithm's inner step calls this and need not know how it is executed: by ``torch.func`` where
    tasks are vectorised, by autograd with a recorded graph where the plain loop runs a module that
    ``torch.func`` cannot take.
    """
    return gradients_and_aux(lambda p: (loss(p), ()), params)[0]


def gradients_and_aux(loss: Callable[[Tensors], tuple[Tensor, Any]], params: Tensors) -> tuple[Tensors, Any]:
    """:func:`gradients` of the first of what ``loss(params)`` returns, and the rest of it, detached."""
    if not _recorded.get():
        return grad(loss, has_aux=True)(params)
    leaves = _leaves(params)
    with torch.enable_grad():
        value, aux = loss(leaves)
        values = torch.autograd.grad(
            value, list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
    return dict(zip(leaves, values, strict=True)), aux


def curvature(loss: Callable[[Tensors], Tensor], params: Tensors) -> Callable[[Tensors], Tensors]:
    """The Hessian of the scalar ``loss`` at ``params``, as a function that multiplies it with a vector.

    The graph is made once, however many vectors follow.
    """
    if not _recorded.get():
        _, back = vjp(grad(loss), params)  # type: ignore[misc]
        return lambda vector: back(vector)[0]
    leaves = _leaves(params)
    slope = {k: v for k, v in gradients(loss, leaves).items() if v.requires_grad}  # the rest is constant

    def product(vector: Tensors) -> Tensors:
        if not slope:
            return {k: torch.zeros_like(v) for k, v in leaves.items()}
        values = torch.autograd.grad(
            list(slope.values()), list(leaves.values()), [vector[k] for k in slope],
            retain_graph=True, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        return dict(zip(leaves, values, strict=True))

    return product


def _leaves(params: Tensors) -> Tensors:
    """``params`` to differentiate by, each for itself: what one of them was computed from another does not count."""
    return {k: v.view_as(v) if v.requires_grad else v.detach().requires_grad_() for k, v in params.items()}


@contextmanager
def recorded() -> Iterator[None]:
    """Within it, :func:`gradients` records a graph that plain autograd differentiates again."""
    token = _recorded.set(True)
    try:
        yield
    finally:
        _recorded.reset(token)
