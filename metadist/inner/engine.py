"""Meta-gradients of a microbatch of tasks by one of three strategies with one answer."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from metadist.episode import EpisodeBatch, Examples
from metadist.errors import first_line
from metadist.inner import adjoint
from metadist.inner.adjoint import InnerProblem
from metadist.inner.functional import FunctionalModel, Tensors
from metadist.inner.gradients import recorded
from metadist.inner.program import Compile, Program

Strategy = Literal["vectorised", "adjoint", "loop"]

log = logging.getLogger(__name__)


class Engine:
    """Runs an algorithm's work on each task over all tasks of a microbatch.

    Args:
        strategy: ``vectorised`` computes all tasks in one call (vmap of the adjoint form); ``adjoint``
            one by one; ``loop`` one by one by plain autograd, for modules that ``torch.func`` cannot take.
        compile: ``"trace"`` derives the vectorised meta-gradient once and from then on runs its operators alone, some
            seconds at its first call; True compiles them as well, a minute or two. See :mod:`metadist.inner.program`.
        recompute: in what is traced, compute each inner step again on the way back rather than keep it.
        together: the most tasks that ``vectorised`` computes in one call, for want of memory; None for all there are.
    """

    def __init__(
        self,
        strategy: Strategy = "vectorised",
        compile: Compile = False,
        recompute: bool = False,
        together: int | None = None,
    ) -> None:
        if strategy not in ("vectorised", "adjoint", "loop"):
            raise ValueError(f"strategy must be vectorised, adjoint or loop, not {strategy!r}")
        if together is not None and together < 1:
            raise ValueError(f"together must be at least 1, not {together}")
        self.strategy, self.recompute, self.together = strategy, recompute, together
        self.compile: Compile = compile if strategy == "vectorised" else False
        self._programs: dict[Any, Program] = {}
        self._sums: dict[InnerProblem, bool] = {}

    def uncompiled(self) -> Engine:
        """The same without compilation, for what is not computed often enough to pay for it."""
        return Engine(self.strategy, together=self.together) if self.compile else self

    def meta_gradient(
        self, problem: InnerProblem, meta_params: Tensors, batch: EpisodeBatch, constants: Tensors | None = None
    ) -> tuple[Tensors, Any]:
        """The gradient of the objective summed over the tasks, and each task's extra outputs, ``[T, ...]``.

        Args:
            problem: the algorithm's inner loop and objective; keep one object for all calls.
            meta_params: what is learned.
            batch: T episodes; ``x [T, examples, ...]``.
            constants: tensors for ``problem.start`` which change from call to call but are not learned.
        """
        shared, tasks = (meta_params, constants or {}), (batch.support, batch.query)
        if self.strategy == "vectorised" and self._may_be_summed(problem, shared, batch):
            many = functools.partial(_together, functools.partial(adjoint.meta_gradient_of_all, problem))
            return self._summed(self._program(many, problem), shared, tasks)
        one = adjoint.loop_meta_gradient if self.strategy == "loop" else adjoint.meta_gradient
        return self.sum_tasks(functools.partial(one, problem), shared, tasks, key=problem)

    def _may_be_summed(self, problem: InnerProblem, shared: tuple[Any, ...], batch: EpisodeBatch) -> bool:
        if problem not in self._sums:
            self._sums[problem] = adjoint.may_be_summed(problem, shared[0], shared[1], batch[0].support)
        return self._sums[problem]

    def sum_tasks(
        self, one: Callable[..., tuple[Tensors, Any]], shared: tuple[Any, ...], tasks: tuple[Any, ...], key: Any = None
    ) -> tuple[Tensors, Any]:
        """``one(*shared, *task) -> (gradient, extra)`` of every task: the sum of the first, the second stacked.

        Args:
            one: a pure function of tensors; what :mod:`~metadist.inner.gradients` offers it may use.
            shared: arguments that are the same for all tasks.
            tasks: arguments with a leading task dimension.
            key: what stands for ``one`` from call to call, so that it is compiled once; None for ``one`` itself.
        """
        if self.strategy == "vectorised":
            program = self._program(functools.partial(_vectorised, one), one if key is None else key)
            return self._summed(program, shared, tasks)

        def alone(*task: Any) -> tuple[Tensors, Any]:
            with self._gradients():
                return _detached(one(*shared, *task))

        total, extras = _added(alone(*task) for task in _unstacked(tasks))
        return total, _stack(extras)

    def sum_batch(
        self, many: Callable[..., tuple[Tensors, Any]], shared: tuple[Any, ...], tasks: tuple[Any, ...], key: Any
    ) -> tuple[Tensors, Any]:
        """:meth:`sum_tasks` for a function that takes several tasks at once, which saves what vmap costs.

        Args:
            many: ``many(*shared, *tasks) -> (summed gradient, extra [T, ...])`` of however many tasks it is given:
                all of them if vectorised, else one at a time.
            shared, tasks: as of :meth:`sum_tasks`.
            key: what stands for ``many`` from call to call.
        """
        if self.strategy != "vectorised":

            def alone(*args: Any) -> tuple[Tensors, Any]:
                task = pytree.tree_map(lambda t: t[None], args[len(shared) :])
                gradient, extra = many(*args[: len(shared)], *task)
                return gradient, pytree.tree_map(lambda t: t[0], extra)

            return self.sum_tasks(alone, shared, tasks)
        return self._summed(self._program(functools.partial(_together, many), key), shared, tasks)

    def map_tasks(self, fn: Callable[[Examples, Examples], Any], batch: EpisodeBatch) -> Any:
        """``fn(support, query)`` of each task, its outputs stacked with a leading task dimension."""
        parts = self._parts((batch.support, batch.query))
        return _joined([self.map(lambda support, query: _detached(fn(support, query)), *part) for part in parts])

    def map(self, fn: Callable[..., Any], *arguments: Any) -> Any:
        """``fn`` of each member of ``arguments``' leading dimension, its outputs stacked.

        It may be called inside :meth:`sum_tasks` and :meth:`sum_batch`, and differentiated.
        """
        if self.strategy == "vectorised":
            return vmap(fn)(*arguments)
        results = []
        for members in _unstacked(arguments):
            with self._gradients():
                results.append(fn(*members))
        return _stack(results)

    @property
    def programs(self) -> int:
        """How many times something was traced or compiled so far: once for each function and set of shapes."""
        return sum(program.shapes for program in self._programs.values())

    def _parts(self, tasks: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """``tasks`` as they are computed together."""
        leaves, spec = pytree.tree_flatten(tasks)
        if self.strategy != "vectorised" or self.together is None or self.together >= len(leaves[0]):
            return [tasks]
        pieces = zip(*(leaf.split(self.together) for leaf in leaves), strict=True)
        return [pytree.tree_unflatten(list(piece), spec) for piece in pieces]

    def _summed(
        self, program: Callable[..., Any], shared: tuple[Any, ...], tasks: tuple[Any, ...]
    ) -> tuple[Tensors, Any]:
        """The gradients of the parts added in their order, what else there is put together again."""
        total, extras = _added(program(shared, part) for part in self._parts(tasks))
        return total, _joined(extras)

    def _program(self, fn: Callable[..., Any], key: Any) -> Callable[..., Any]:
        """``fn``, or what was made of it when ``key`` first came."""
        if not self.compile:
            return fn
        if key not in self._programs:
            self._programs[key] = Program(fn, self.compile is True, self.recompute)
        return self._programs[key]

    def _gradients(self) -> contextlib.AbstractContextManager[None]:
        """How inner steps take their gradients: recorded by autograd in the loop, by torch.func elsewhere."""
        return recorded() if self.strategy == "loop" else contextlib.nullcontext()


def choose_strategy(
    model: FunctionalModel, probe: Callable[[Engine], bool], traced: bool = False
) -> tuple[Strategy, bool, str]:
    """The fastest strategy the model admits, whether it can be traced, and why not if it is not the one hoped for.

    A rule over the model alone, never a timing: two runs of one config must have the same bits.

    Args:
        model: the model.
        probe: runs one microbatch with the engine it is given; whether it drew random numbers (:func:`drew_numbers`).
            Raises if the engine cannot.
        traced: whether tracing is hoped for.
    """
    random = "the model draws random numbers (dropout), which every pass over a task must repeat"
    if model.random:
        return "loop", False, random
    reason = ""
    hopes: tuple[tuple[Strategy, bool], ...] = (("vectorised", True), ("vectorised", False), ("adjoint", False))
    for strategy, trace in hopes if traced else hopes[1:]:
        try:
            # Not every module that draws shows it by its type: F.dropout, the dropout of an LSTM.
            drew = probe(Engine(strategy, "trace" if trace else False))
            return ("loop", False, random) if drew else (strategy, trace, reason)
        except (RuntimeError, NotImplementedError, TypeError) as e:
            reason = first_line(e)
            log.debug("strategy %s is out: %s", strategy, reason)
    return "loop", False, reason


def drew_numbers(call: Callable[[], Any]) -> bool:
    """Whether ``call()`` drew random numbers."""
    before = torch.get_rng_state()
    call()
    return not torch.equal(before, torch.get_rng_state())


def _vectorised(
    one: Callable[..., tuple[Tensors, Any]], shared: tuple[Any, ...], tasks: tuple[Any, ...]
) -> tuple[Tensors, Any]:
    """Summed gradients and stacked extra outputs of all tasks in one call."""
    gradient, extra = vmap(lambda *task: one(*shared, *task))(*tasks)
    return {k: v.sum(0) for k, v in gradient.items()}, _detached(extra)


def _together(
    many: Callable[..., tuple[Tensors, Any]], shared: tuple[Any, ...], tasks: tuple[Any, ...]
) -> tuple[Tensors, Any]:
    """What ``many`` makes of all tasks."""
    gradient, extra = many(*shared, *tasks)
    return _detached(gradient), _detached(extra)


def _added(results: Iterable[tuple[Tensors, Any]]) -> tuple[Tensors, list[Any]]:
    """The sum of the gradients in their order, and a list of what comes with each."""
    total: Tensors | None = None
    extras = []
    for gradient, extra in results:
        extras.append(extra)
        total = gradient if total is None else {k: v + gradient[k] for k, v in total.items()}
    assert total is not None, "a batch has at least one task"
    return total, extras


def _unstacked(tasks: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    leaves, spec = pytree.tree_flatten(tasks)
    return [pytree.tree_unflatten([leaf[i] for leaf in leaves], spec) for i in range(len(leaves[0]))]


def _detached(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.detach, tree)


def _joined(trees: list[Any]) -> Any:
    return trees[0] if len(trees) == 1 else pytree.tree_map(lambda *leaves: torch.cat(leaves), *trees)


def _stack(trees: list[Any]) -> Any:
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)
