"""Model-agnostic meta-learning, and what its relatives share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from metadist.algorithms.base import STEP, Algorithm, TaskResults
from metadist.algorithms.losses import LossFunction, Objective
from metadist.episode import EpisodeBatch, Examples
from metadist.inner import Engine, FunctionalModel, InnerProblem, Tensors
from metadist.inner.adjoint import adapt
from metadist.inner.gradients import gradients_and_aux
from metadist.inner.optimizers import SGD, InnerOptimizer, Moments

OPTIMIZER = "inner_optimizer/"
LOG_LR = "log_lr"


class MAML(Algorithm):
    """An initialisation from which a few gradient steps solve a task (Finn et al. 2017, algorithm 1).

    With ``theta_0`` the initialisation and ``theta_{k+1} = theta_k - inner_lr * grad L_support(theta_k)``,
    the meta-gradient is that of ``L_query(theta_K)`` with respect to ``theta_0``, exact to second order.

    Relatives override :meth:`start` (what is adapted, what is only read, from where it sets out),
    :meth:`slope` (what a step goes down) and :meth:`rate` (how far).

    Args:
        inner_lr: step size of the inner loop.
        inner_steps: its steps K in training.
        evaluation_inner_steps: its steps in evaluation and use; None takes ``inner_steps``.
        first_order: leave out the second derivatives (section 5.2 of the paper).
        inner_optimizer: what a step makes of a gradient; None takes plain gradient descent. One that is ``learned``
            adds its hyper-parameters to the meta-parameters as ``inner_optimizer/NAME``, among them the step size
            as ``log_lr``.
        loss: ``auto``, ``cross_entropy``, ``binary_cross_entropy``, ``mse`` or a function of (output, target).
        metric: ``auto``, ``accuracy``, ``auc``, ``mean_squared_error``, ``mean_absolute_error`` or ``ndcg``.
        adapted: patterns of the names of the model's parameters that the inner loop changes, e.g. ``head.*``; the
            others are learned and the same for every task. None: it changes all.
        inner_lr_for: support examples that ``inner_lr`` is meant for: of n the inner loop goes down the support loss
            times ``n / inner_lr_for``, so that it learns little from few, as the evidence beside a prior weighs by
            their number. None: their mean, however few they are.
    """

    def __init__(
        self,
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        evaluation_inner_steps: int | None = None,
        first_order: bool = False,
        loss: str | LossFunction = "auto",
        metric: str = "auto",
        inner_optimizer: InnerOptimizer | None = None,
        adapted: Sequence[str] | None = None,
        inner_lr_for: int | None = None,
    ) -> None:
        if not inner_lr > 0:
            raise ValueError(f"inner_lr must be positive, not {inner_lr}")
        for name, steps in (("inner_steps", inner_steps), ("evaluation_inner_steps", evaluation_inner_steps)):
            if steps is not None and steps < 1:
                raise ValueError(f"{name} must be at least 1, not {steps}")
        self.inner_lr, self.inner_steps, self.first_order = inner_lr, inner_steps, first_order
        self.loss, self.metric = loss, metric
        self.inner_optimizer = SGD() if inner_optimizer is None else inner_optimizer
        self.evaluation_inner_steps = inner_steps if evaluation_inner_steps is None else evaluation_inner_steps
        if inner_lr_for is not None and inner_lr_for < 1:
            raise ValueError(f"inner_lr_for must be at least 1, not {inner_lr_for}")
        self.adapted, self.inner_lr_for = None if adapted is None else tuple(adapted), inner_lr_for
        self.exact = not first_order  # type: ignore[misc]

    # ----------------------------------------------------------------- what relatives change

    def start(
        self, meta_params: Tensors, constants: Tensors, support: Examples, evaluation: bool
    ) -> tuple[dict[str, Any], Tensors]:
        """What the inner loop only reads, and the tensors it adapts: all of the model's parameters.

        ``shared["params"]`` holds what of the model is not adapted.
        """
        fast = {k: meta_params[k] for k in self.parameter_names if self.adapts(k)}
        rest = [k for k in (*self.parameter_names, *self.model.statistics) if k not in fast]
        learned = {k: meta_params[OPTIMIZER + k] for k in self._learned_by_optimizer()}
        return {"params": {k: meta_params[k] for k in rest}, "constants": constants, "optimizer": learned}, fast

    def adapts(self, name: str) -> bool:
        """Whether the inner loop changes a parameter of the model."""
        return self.adapted is None or any(fnmatchcase(name, pattern) for pattern in self.adapted)

    def reads_only(self, name: str) -> bool:
        return not self.adapts(name)

    def slope(self, shared: Any, fast: Tensors, gradient: Tensors) -> Tensors:
        """What the optimizer is given: the gradient of the support loss, and what a relative adds to it."""
        return gradient

    def rate(self, shared: Any, name: str, k: int) -> float | Tensor:
        """The step size of a parameter in step ``k``."""
        return shared["optimizer"][LOG_LR].exp() if LOG_LR in shared["optimizer"] else self.inner_lr

    def has_rates(self) -> bool:
        """Whether the learner learns step sizes of its own, in place of a single one."""
        return False

    def params(self, shared: Any, fast: Tensors) -> Tensors:
        """The model's parameters, from what is shared and what is adapted."""
        return {**shared["params"], **fast}

    def support_loss(self, shared: Any, fast: Tensors, support: Examples, k: int, evaluation: bool) -> Tensor:
        """What step ``k`` of the inner loop goes down."""
        output = self.model(self.params(shared, fast), support.x, step=k, evaluation=evaluation)
        loss = self.objective.loss(output, support.y)
        return loss if self.inner_lr_for is None else loss * (len(support.y) / self.inner_lr_for)

    def output(self, params: Tensors, support: Examples, x: Tensor, k: int, evaluation: bool) -> Tensor:
        """The model's outputs for ``x`` after ``k`` inner steps."""
        return self.model(params, x, reference=support.x, step=k, evaluation=evaluation)

    def weighed(self, shared: Any, loss: Tensor, k: int) -> Tensor:
        """The part that the query loss after ``k`` steps has in the objective."""
        return loss

    def constants(self) -> Tensors:
        """Tensors which the inner loop reads as shared and which change with the version, not with learning."""
        return {}

    # ----------------------------------------------------------------- the contract

    def bind(self, model: FunctionalModel, objective: Objective, engine: Engine) -> Algorithm:
        self.parameter_names = tuple(model.initial_params())
        for pattern in self.adapted or ():
            if not any(fnmatchcase(name, pattern) for name in self.parameter_names):
                known = ", ".join(self.parameter_names)
                raise ValueError(f"adapted: {pattern!r} is the name of no parameter of the model; it has {known}")
        self._problems: dict[Any, InnerProblem] = {}
        return super().bind(model, objective, engine)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**state, "_problems": {}} if "_problems" in state else state

    def initial_meta_params(self) -> Tensors:
        params = self.model.initial_params()
        like = next(iter(params.values()))
        learned = {OPTIMIZER + k: like.new_tensor(v) for k, v in self._learned_by_optimizer().items()}
        return {**params, **self.model.initial_statistics(self.inner_steps + 1), **learned}

    def meta_gradient(self, meta_params: Tensors, batch: EpisodeBatch) -> TaskResults:
        problem = self.problem(self.inner_steps)
        gradient, (metrics, seen) = self.engine.meta_gradient(problem, meta_params, batch, self.constants())
        return self.results(meta_params, batch, gradient, metrics, seen)

    def adapt(self, meta_params: Tensors, support: Examples, *, evaluation: bool = False) -> Tensors:
        steps = self.evaluation_inner_steps if evaluation else self.inner_steps
        shared, (fast, *_) = adapt(self.problem(steps, evaluation), meta_params, self.constants(), support)
        return self.params(shared, fast)

    def evaluate(self, meta_params: Tensors, batch: EpisodeBatch) -> Tensors:
        """As of :class:`Algorithm`; also each metric after every inner step on the way, as ``after_step_K/NAME``."""

        def one(support: Examples, query: Examples) -> Tensors:
            found: Tensors = {}

            def judge(k: int, shared: Any, state: Any) -> None:
                params = self.params(shared, state[0])
                output = self.output(params, support, query.x, min(k, self.inner_steps), True)
                found.update({f"{STEP}{k}/{name}": value for name, value in self.judge(output, query)[1].items()})

            problem = self.problem(self.evaluation_inner_steps, evaluation=True)
            shared, (fast, *_) = adapt(problem, meta_params, self.constants(), support, judge)
            params = self.params(shared, fast)
            return {**self.query_objective(params, support, query, evaluation=True)[1], **found}

        return {**self.engine.map_tasks(one, batch), **self.before_adaptation(meta_params, batch, evaluation=True)}

    def predict(self, adapted: Tensors, support: Examples, x: Tensor, *, evaluation: bool = False) -> Tensor:
        return self.output(adapted, support, x, self.inner_steps, evaluation)

    def predict_unadapted(self, meta_params: Tensors, support: Examples, x: Tensor, *, evaluation: bool) -> Tensor:
        shared, fast = self.start(meta_params, self.constants(), support, evaluation)
        return self.output(self.params(shared, fast), support, x, 0, evaluation)

    # ----------------------------------------------------------------- the inner loop as the engine takes it

    def update(
        self, shared: Any, fast: Tensors, gradient: Tensors, moments: Moments, k: int
    ) -> tuple[Tensors, Moments]:
        """What is adapted after step ``k``, from the gradient of the support loss; what the optimizer remembers."""
        slope = self.slope(shared, fast, gradient)
        direction, moments = self.inner_optimizer.direction(slope, moments, k, shared["optimizer"])
        return {name: fast[name] - self.rate(shared, name, k) * direction[name] for name in fast}, moments

    def _learned_by_optimizer(self) -> dict[str, float]:
        """The inner optimizer's learned hyper-parameters and what they start from."""
        if not self.inner_optimizer.learned:
            return {}
        rate = {} if self.has_rates() else {LOG_LR: math.log(self.inner_lr)}
        return {**rate, **self.inner_optimizer.hyperparameters()}

    def problem(self, steps: int, evaluation: bool = False) -> InnerProblem:
        """The inner loop; one object for each kind, as the engine keeps what it compiled for it."""
        key = (steps, evaluation, self.is_first_order(), self.judges_every_step())
        if key not in self._problems:
            self._problems[key] = self._make_problem(*key)
        return self._problems[key]

    def judges_every_step(self) -> bool:
        """Whether the objective counts the query loss after every inner step at this moment."""
        return False

    def is_first_order(self) -> bool:
        """Whether second derivatives are left out at this moment."""
        return self.first_order

    def _make_problem(self, steps: int, evaluation: bool, first_order: bool, every_step: bool) -> InnerProblem:
        """The state that the inner loop changes is what is adapted, BatchNorm statistics seen on the way, moments."""

        def start(meta_params: Tensors, constants: Tensors, support: Examples) -> tuple[Any, Any]:
            with self.model.recording() as now:
                shared, fast = self.start(meta_params, constants, support, evaluation)
            blank = {} if evaluation else {k: torch.zeros_like(meta_params[k]) for k in self.model.averages()}
            return shared, (fast, _noted(blank, now, 0), self.inner_optimizer.start(fast))

        def step(shared: Any, state: Any, support: Examples, k: int) -> Any:
            fast, seen, moments = state

            def loss(fast: Tensors) -> tuple[Tensor, Tensors]:
                with self.model.recording() as now:
                    return self.support_loss(shared, fast, support, k, evaluation), now

            gradient, now = gradients_and_aux(loss, fast)
            fast, moments = self.update(shared, fast, gradient, moments, k)
            return fast, _noted(seen, now, k), moments

        def objective(shared: Any, state: Any, support: Examples, query: Examples, k: int) -> tuple[Tensor, Any]:
            fast, seen, _ = state
            with self.model.recording() as now:
                output = self.output(self.params(shared, fast), support, query.x, k, evaluation)
            loss, metrics = self.judge(output, query)
            return self.weighed(shared, loss, k), (metrics, _noted(seen, now, k))

        return InnerProblem(step, objective, steps, start, first_order, every_step)


def _noted(seen: Tensors, now: Tensors, row: int) -> Tensors:
    """``seen [rows, channels]`` with the statistics of now in a row, the last row if there are fewer."""

    def put(values: Tensor, new: Tensor) -> Tensor:
        mark = torch.zeros_like(values)
        mark[min(row, len(values) - 1)] = 1
        return values + mark * new

    return {k: put(v, now[k]) if k in now else v for k, v in seen.items()}
