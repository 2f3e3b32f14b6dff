"""The contract of a learner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from metadist.algorithms.losses import METRICS, LossFunction, Objective, outsiders_auroc
from metadist.episode import Episode, EpisodeBatch, Examples
from metadist.inner import Engine, FunctionalModel, InnerProblem, Tensors
from metadist.rounds import Moment
from metadist.tasks.outsiders import OUTSIDE

PRE = "pre_adaptation_"
OUTSIDERS, ALSO = "outsiders_auroc", "also/"
STEP = "after_step_"
"""What the metrics of evaluations after single inner steps begin with: ``after_step_1/loss``."""


@dataclass(frozen=True)
class TaskResults:
    """What one microbatch of T tasks gave.

    Args:
        gradient: the *sum* over its tasks of the meta-gradient, one tensor for each meta-parameter.
        metrics: per task, ``[T]`` each: ``loss``, the metric by its name, and both again before adaptation.
    """

    gradient: Tensors
    metrics: Tensors


@dataclass(frozen=True)
class Plan:
    """How every meta-batch of a run is cut up.

    Args:
        tasks: of a meta-batch.
        tasks_per_microbatch: of a microbatch; the last may hold fewer.
    """

    tasks: int = 1
    tasks_per_microbatch: int = 1

    @property
    def sizes(self) -> list[int]:
        """Tasks of each microbatch."""
        starts = range(0, self.tasks, self.tasks_per_microbatch)
        return [min(self.tasks_per_microbatch, self.tasks - start) for start in starts]


@dataclass(frozen=True)
class Rule:
    """How the meta-update treats a meta-parameter that no optimizer should move.

    Args:
        kind: ``average``: a running average; what ``meta_gradient`` gives for it is this batch's observation,
            summed over tasks, towards whose mean it moves by ``rate``. ``replace``: the sum over the meta-batch of
            what ``meta_gradient`` gives is its next value. ``keep``: it stays.
        rate: of the running average, in (0, 1].
    """

    kind: Literal["average", "replace", "keep"]
    rate: float = 1.0


class Algorithm:
    """A learner. Subclass it with :meth:`adapt` alone, or with :meth:`meta_gradient` as well.

    Its constructor takes the hyper-parameters; :meth:`bind` hands it the model, the objective and the
    engine before anything else is called, as ``self.model``, ``self.objective`` and ``self.engine``.
    With :meth:`adapt` alone the meta-gradient is the derivative of the query loss through it.
    """

    exact: ClassVar[bool] = True
    """Whether :meth:`meta_gradient` claims to be the derivative of the query loss after adaptation."""

    any_ways: ClassVar[bool] = False
    """Whether tasks may have another number of classes than those it learned from."""

    wants: ClassVar[Literal["outputs", "features"]] = "outputs"
    """Whether the models of this package are built with a last layer for the task's outputs or without."""

    wants_order: ClassVar[tuple[str, ...]] = ()
    """Values of ``tasks.order`` that the learner can do with; none named: any."""

    loss: str | LossFunction = "auto"
    metric: str = "auto"
    takes_outsiders: ClassVar[bool] = True
    """Whether query sets may hold examples of no class."""

    also: tuple[str, ...] = ()
    """Metrics that evaluations report beside the task's own, by their names; set with the model."""
    moment: Moment = Moment()
    """What is being computed; set by the worker before each call."""
    plan: Plan = Plan()
    """How meta-batches are cut up; set before :meth:`prepare`."""
    tasks_held_for: int = 1
    """Meta-updates for which each place in the meta-batch keeps its task; see :meth:`Moment.since`."""

    model: FunctionalModel
    objective: Objective
    engine: Engine

    def prepare(self, module: nn.Module, example: Episode) -> nn.Module:
        """The module to learn with: ``module`` itself, or one made around it.

        Called with torch's generator seeded, before :meth:`bind`.

        Args:
            module: the network of the config.
            example: an episode, for the shapes of inputs and targets.
        """
        return module

    def bind(self, model: FunctionalModel, objective: Objective, engine: Engine) -> Algorithm:
        """Hands over what the learner works with; returns the learner."""
        self.model, self.objective, self.engine = model, objective, engine
        return self

    def initial_meta_params(self) -> Tensors:
        """What is learned, by name, before the first update: by default the model's parameters."""
        return {**self.model.initial_params(), **self.model.initial_statistics(1)}

    def update_rules(self) -> dict[str, Rule]:
        """Meta-parameters which the outer optimizer does not move, by name; by default BatchNorm's statistics."""
        moving = self.model.averages()
        return {k: Rule("average", moving[k]) if k in moving else Rule("keep") for k in self.model.statistics}

    def reads_only(self, name: str) -> bool:
        """Whether adaptation asks for no slope with respect to a parameter of the model: frozen, it costs none then."""
        return False

    # ----------------------------------------------------------------- what a learner defines

    def adapt(self, meta_params: Tensors, support: Examples, *, evaluation: bool = False) -> Any:
        """The learner adapted to one task: parameters for ``self.model``, or whatever :meth:`predict` reads.

        Args:
            meta_params: what is learned.
            support: the task's examples, ``x [S, ...]``, ``y [S, ...]``.
            evaluation: whether this is for use rather than for learning.

        Returns:
            Tensors, in dicts nested as deep as one likes.
        """
        raise TypeError(f"{type(self).__name__} must define adapt(self, meta_params, support, *, evaluation=False)")

    def predict(self, adapted: Any, support: Examples, x: Tensor, *, evaluation: bool = False) -> Tensor:
        """The adapted learner's outputs for ``x [N, ...]``: by default the model's."""
        return self.model(adapted, x, reference=support.x, evaluation=evaluation)

    def predict_unadapted(self, meta_params: Tensors, support: Examples, x: Tensor, *, evaluation: bool) -> Tensor:
        """The same before adaptation: by default the model's outputs under the meta-parameters themselves."""
        return self.model(meta_params, x, reference=support.x, evaluation=evaluation)

    def meta_gradient(self, meta_params: Tensors, batch: EpisodeBatch) -> TaskResults:
        """The summed meta-gradient and metrics of the tasks in ``batch``."""
        gradient, (metrics, seen) = self.engine.meta_gradient(self._whole(), meta_params, batch)
        return self.results(meta_params, batch, gradient, metrics, seen)

    def with_ways(self, ways: int) -> Algorithm:
        """The bound learner for tasks of so many classes; itself, unless it has to be told."""
        return self

    # ----------------------------------------------------------------- what follows from it

    def evaluate(self, meta_params: Tensors, batch: EpisodeBatch) -> Tensors:
        """The metrics of :class:`TaskResults`, for adaptation as in use."""

        def one(support: Examples, query: Examples) -> Tensors:
            adapted = self.adapt(meta_params, support, evaluation=True)
            return self.query_objective(adapted, support, query, evaluation=True)[1]

        return {**self.engine.map_tasks(one, batch), **self.before_adaptation(meta_params, batch, evaluation=True)}

    def evaluate_in_full(self, meta_params: Tensors, batch: EpisodeBatch) -> Tensors:
        """As :meth:`evaluate`, with the metrics of :attr:`also` and, of query sets with outsiders, their AUROC."""
        measures = {ALSO + name: METRICS[name][0] for name in self.also}
        y = batch.query.y
        if not y.is_floating_point() and bool((y == OUTSIDE).any()):
            measures[OUTSIDERS] = outsiders_auroc
        metrics = self.evaluate(meta_params, batch)
        if measures:
            _, after = self.outputs(meta_params, batch)
            metrics |= {name: self.engine.map(measure, after, y) for name, measure in measures.items()}
        return metrics

    def outputs(self, meta_params: Tensors, batch: EpisodeBatch) -> tuple[Tensor, Tensor]:
        """Outputs on each task's query set before and after adaptation, ``[T, Q, ...]`` both."""

        def one(support: Examples, query: Examples) -> tuple[Tensor, Tensor]:
            before = self.predict_unadapted(meta_params, support, query.x, evaluation=True)
            adapted = self.adapt(meta_params, support, evaluation=True)
            return before, self.predict(adapted, support, query.x, evaluation=True)

        before, after = self.engine.map_tasks(one, batch)
        return before, after

    def query_objective(
        self, adapted: Any, support: Examples, query: Examples, *, evaluation: bool = False
    ) -> tuple[Tensor, Tensors]:
        """The query loss of the adapted learner, and the metrics ``loss`` and the task's own."""
        return self.judge(self.predict(adapted, support, query.x, evaluation=evaluation), query)

    def judge(self, output: Tensor, query: Examples) -> tuple[Tensor, Tensors]:
        """The loss of ``output`` on the query set, and the metrics ``loss`` and the task's own."""
        loss = self.objective.loss(output, query.y)
        return loss, {"loss": loss.detach(), self.objective.metric: self.objective.measure(output.detach(), query.y)}

    def results(
        self, meta_params: Tensors, batch: EpisodeBatch, gradient: Tensors, metrics: Tensors, seen: Tensors
    ) -> TaskResults:
        """What :meth:`meta_gradient` returns, from what a learner has computed of it.

        Args:
            meta_params, batch: what it was called with; the metrics before adaptation are computed here.
            gradient: summed over the tasks.
            metrics: of each task, ``[T]``.
            seen: each task's BatchNorm statistics by the names of the averages, ``[T, channels]`` or ``[T, rows,
                channels]``, which stand in the gradient as what was observed.
        """
        observed = {k: v.sum(0).view_as(meta_params[k]) for k, v in seen.items()}
        return TaskResults({**gradient, **observed}, {**metrics, **self.before_adaptation(meta_params, batch)})

    def before_adaptation(self, meta_params: Tensors, batch: EpisodeBatch, *, evaluation: bool = False) -> Tensors:
        """The query metrics without adaptation, ``[T]`` each, named with the prefix ``pre_adaptation_``."""
        params = {k: v.detach() for k, v in meta_params.items()}

        def one(params: Tensors, support: Examples, query: Examples) -> tuple[Tensors, Tensors]:
            return {}, self.judge(self.predict_unadapted(params, support, query.x, evaluation=evaluation), query)[1]

        # Evaluations come in microbatches of another size, for which compiling would not pay.
        engine = self.engine if not evaluation else self.engine.uncompiled()
        with torch.no_grad():
            _, metrics = engine.sum_tasks(one, (params,), (batch.support, batch.query), key="before adaptation")
        return {PRE + k: v for k, v in metrics.items()}

    def __getstate__(self) -> dict[str, Any]:
        # What the engine compiles by is made again where it is needed: functions within functions do not travel.
        return {k: v for k, v in self.__dict__.items() if k != "_as_one_step"}

    def _whole(self) -> InnerProblem:
        """Adaptation as a single step of the engine."""
        if not hasattr(self, "_as_one_step"):

            def step(shared: Any, fast: Any, support: Examples, k: int) -> Any:
                return self.adapt(fast, support)

            def objective(shared: Any, fast: Any, support: Examples, query: Examples, k: int) -> tuple[Tensor, Any]:
                with self.model.recording() as seen:
                    loss, metrics = self.query_objective(fast, support, query)
                return loss, (metrics, seen)

            self._as_one_step = InnerProblem(step, objective, steps=1)
        return self._as_one_step
