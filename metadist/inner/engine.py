"""Meta-gradients of a microbatch of tasks by one of three strategies with one answer."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from metadist.episode import EpisodeBatch, Examples
from metadist.errors import first_line
from metadist.inner import adjoint
from metadist.inner.adjoint import InnerProblem
from metadist.inner.compiled import CompiledFunction
from metadist.inner.functional import FunctionalModel, Tensors
from metadist.inner.gradients import recorded

Strategy = Literal["vectorised", "adjoint", "loop"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskGradients:
    """Gradients summed over the tasks of a microbatch, and each task's extra outputs (stacked, ``[T, ...]``)."""

    shared: Tensors
    fast: Tensors
    extra: Any


class Engine:
    """Runs an algorithm's inner problem over the tasks of a microbatch.

    Args:
        strategy: ``vectorised`` computes all tasks in one call (vmap of the adjoint form); ``adjoint``
            one by one; ``loop`` one by one by plain autograd, for modules that ``torch.func`` cannot take.
        compile: compile the vectorised meta-gradient; takes a minute or two at its first call.
    """

    def __init__(self, strategy: Strategy = "vectorised", compile: bool = False) -> None:
        if strategy not in ("vectorised", "adjoint", "loop"):
            raise ValueError(f"strategy must be vectorised, adjoint or loop, not {strategy!r}")
        self.strategy, self.compile = strategy, compile and strategy == "vectorised"
        self._compiled: dict[InnerProblem, CompiledFunction] = {}

    def meta_gradient(
        self, problem: InnerProblem, shared: Tensors, fast: Tensors, batch: EpisodeBatch
    ) -> TaskGradients:
        """The sum over the batch's tasks of the gradient of each task's objective.

        Args:
            problem: the algorithm's step and objective.
            shared: meta-parameters that are not adapted.
            fast: the initialisation of those that are.
            batch: T episodes; ``x [T, examples, ...]``.
        """

        if self.strategy == "vectorised":
            run = self._compiled_for(problem) if self.compile else functools.partial(_vectorised, problem)
            return TaskGradients(*run(shared, fast, batch.support, batch.query))

        one = adjoint.loop_meta_gradient if self.strategy == "loop" else adjoint.meta_gradient
        total: tuple[Tensors, Tensors] | None = None
        extras = []
        for episode in batch:
            with self._gradients():
                *grads, extra = one(problem, shared, fast, episode.support, episode.query)
            extras.append(_detached(extra))
            total = (grads[0], grads[1]) if total is None else (_add(total[0], grads[0]), _add(total[1], grads[1]))
        assert total is not None, "a batch has at least one task"
        return TaskGradients(total[0], total[1], _stack(extras))

    def _compiled_for(self, problem: InnerProblem) -> CompiledFunction:
        if problem not in self._compiled:
            self._compiled[problem] = CompiledFunction(functools.partial(_vectorised, problem))
        return self._compiled[problem]

    def map_tasks(self, fn: Callable[[Examples, Examples], Any], batch: EpisodeBatch) -> Any:
        """``fn(support, query)`` of each task, its outputs stacked with a leading task dimension."""
        if self.strategy == "vectorised":
            return _detached(vmap(fn)(batch.support, batch.query))
        results = []
        for episode in batch:
            with self._gradients():
                results.append(_detached(fn(episode.support, episode.query)))
        return _stack(results)

    def _gradients(self) -> contextlib.AbstractContextManager[None]:
        """How inner steps take their gradients: recorded by autograd in the loop, by torch.func elsewhere."""
        return recorded() if self.strategy == "loop" else contextlib.nullcontext()


def choose_strategy(model: FunctionalModel, probe: Callable[[Engine], Any]) -> tuple[Strategy, str]:
    """The fastest strategy the model admits, and why it is not ``vectorised`` if it is not.

    A rule over the model alone, never a timing: two runs of one config must have the same bits.

    Args:
        model: the model.
        probe: runs one microbatch with the engine it is given; raises if the engine cannot.
    """
    random = "the model draws random numbers (dropout), which every pass over a task must repeat"
    if model.random:
        return "loop", random
    reason = ""
    for strategy in ("vectorised", "adjoint"):
        drawn = torch.get_rng_state()
        try:
            probe(Engine(strategy))
            # Not every module that draws shows it by its type: F.dropout, the dropout of an LSTM.
            return (strategy, reason) if torch.equal(drawn, torch.get_rng_state()) else ("loop", random)
        except (RuntimeError, NotImplementedError, TypeError) as e:
            reason = first_line(e)
            log.debug("strategy %s is out: %s", strategy, reason)
    return "loop", reason


def _vectorised(
    problem: InnerProblem, shared: Tensors, fast: Tensors, support: Examples, query: Examples
) -> tuple[Tensors, Tensors, Any]:
    """Summed gradients and stacked extra outputs of all tasks in one call."""

    def one(support: Examples, query: Examples) -> tuple[Tensors, Tensors, Any]:
        return adjoint.meta_gradient(problem, shared, fast, support, query)

    g_shared, g_fast, extra = vmap(one)(support, query)
    return _sum_tasks(g_shared), _sum_tasks(g_fast), _detached(extra)


def _sum_tasks(tensors: Tensors) -> Tensors:
    return {k: v.sum(0) for k, v in tensors.items()}


def _add(a: Tensors, b: Tensors) -> Tensors:
    return {k: a[k] + b[k] for k in a}


def _detached(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.detach, tree)


def _stack(trees: list[Any]) -> Any:
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)
