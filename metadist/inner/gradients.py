"""The gradient inside an inner step, in a form that whichever engine runs it can differentiate again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.func import grad

from metadist.inner.functional import Tensors

_recorded: ContextVar[bool] = ContextVar("recorded", default=False)


def gradients(loss: Callable[[Tensors], Tensor], params: Tensors) -> Tensors:
    """The gradient of the scalar ``loss(params)`` with respect to every tensor of ``params``.

    An algorithm's inner step calls this and need not know how it is executed: by ``torch.func`` where
    tasks are vectorised, by autograd with a recorded graph where the plain loop runs a module that
    ``torch.func`` cannot take.
    """
    if not _recorded.get():
        return grad(loss)(params)
    leaves = {k: v if v.requires_grad else v.detach().requires_grad_() for k, v in params.items()}
    with torch.enable_grad():
        values = torch.autograd.grad(
            loss(leaves), list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
    return dict(zip(leaves, values, strict=True))


@contextmanager
def recorded() -> Iterator[None]:
    """Within it, :func:`gradients` records a graph that plain autograd differentiates again."""
    token = _recorded.set(True)
    try:
        yield
    finally:
        _recorded.reset(token)
