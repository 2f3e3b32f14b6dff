"""The contract of a learner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metadist.algorithms.losses import LossFunction, Objective
from metadist.episode import EpisodeBatch, Examples
from metadist.inner import Engine, FunctionalModel, InnerProblem, Tensors

PRE = "pre_adaptation_"


@dataclass(frozen=True)
class TaskResults:
    """What one microbatch of T tasks gave.

    Args:
        gradient: the *sum* over its tasks of the meta-gradient, one tensor for each meta-parameter.
        metrics: per task, ``[T]`` each: ``loss``, the metric by its name, and both again before adaptation.
    """

    gradient: Tensors
    metrics: Tensors


class Algorithm:
    """A learner. Subclass it with :meth:`adapt` alone, or with :meth:`meta_gradient` as well.

    Its constructor takes the hyper-parameters; :meth:`bind` hands it the model, the objective and the
    engine before anything else is called, as ``self.model``, ``self.objective`` and ``self.engine``.
    With :meth:`adapt` alone the meta-gradient is the derivative of the query loss through it.
    """

    exact: ClassVar[bool] = True
    """Whether :meth:`meta_gradient` claims to be the derivative of the query loss after adaptation."""

    loss: str | LossFunction = "auto"
    model: FunctionalModel
    objective: Objective
    engine: Engine

    def bind(self, model: FunctionalModel, objective: Objective, engine: Engine) -> Algorithm:
        """Hands over what the learner works with; returns the learner."""
        self.model, self.objective, self.engine = model, objective, engine
        return self

    def initial_meta_params(self) -> Tensors:
        """What is learned, by name, before the first update: by default the model's parameters."""
        return self.model.initial_params()

    def adapt(self, meta_params: Tensors, support: Examples, *, evaluation: bool = False) -> Tensors:
        """Parameters for ``self.model`` adapted to one task.

        Args:
            meta_params: what is learned.
            support: the task's examples, ``x [S, ...]``, ``y [S, ...]``.
            evaluation: whether this is for use rather than for learning.
        """
        raise TypeError(f"{type(self).__name__} must define adapt(self, meta_params, support, *, evaluation=False)")

    def meta_gradient(self, meta_params: Tensors, batch: EpisodeBatch) -> TaskResults:
        """The summed meta-gradient and metrics of the tasks in ``batch``."""

        def step(shared: Tensors, fast: Tensors, support: Examples) -> Tensors:
            return self.adapt(fast, support)

        def objective(shared: Tensors, fast: Tensors, query: Examples) -> tuple[Tensor, Tensors]:
            return self.query_objective(fast, query)

        results = self.engine.meta_gradient(InnerProblem(step, objective, steps=1), {}, meta_params, batch)
        return TaskResults(results.fast, {**results.extra, **self.before_adaptation(meta_params, batch)})

    def evaluate(self, meta_params: Tensors, batch: EpisodeBatch) -> Tensors:
        """The metrics of :class:`TaskResults`, for adaptation as in use."""

        def one(support: Examples, query: Examples) -> Tensors:
            return self.query_objective(self.adapt(meta_params, support, evaluation=True), query)[1]

        return {**self.engine.map_tasks(one, batch), **self.before_adaptation(meta_params, batch)}

    def predict(self, meta_params: Tensors, batch: EpisodeBatch) -> tuple[Tensor, Tensor]:
        """Outputs on each task's query set before and after adaptation, ``[T, Q, ...]`` both."""

        def one(support: Examples, query: Examples) -> tuple[Tensor, Tensor]:
            before = self.model(self.unadapted(meta_params), query.x)
            return before, self.model(self.adapt(meta_params, support, evaluation=True), query.x)

        before, after = self.engine.map_tasks(one, batch)
        return before, after

    def unadapted(self, meta_params: Tensors) -> Tensors:
        """Parameters for ``self.model`` before adaptation."""
        return meta_params

    def query_objective(self, params: Tensors, query: Examples) -> tuple[Tensor, Tensors]:
        """The query loss under adapted ``params``, and the metrics ``loss`` and the task's own."""
        output = self.model(params, query.x)
        loss = self.objective.loss(output, query.y)
        return loss, {"loss": loss.detach(), self.objective.metric: self.objective.measure(output.detach(), query.y)}

    def before_adaptation(self, meta_params: Tensors, batch: EpisodeBatch) -> Tensors:
        """The query metrics without adaptation, ``[T]`` each, named with the prefix ``pre_adaptation_``."""
        params = {k: v.detach() for k, v in self.unadapted(meta_params).items()}

        def one(support: Examples, query: Examples) -> Tensors:
            return self.query_objective(params, query)[1]

        with torch.no_grad():
            return {PRE + k: v for k, v in self.engine.map_tasks(one, batch).items()}
