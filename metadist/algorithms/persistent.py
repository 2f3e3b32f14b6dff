"""Evolution strategies for inner loops that last longer than a meta-update."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from metadist.algorithms.base import Algorithm, Rule, TaskResults
from metadist.algorithms.evolution import ES, flattened, repeated, unflattened
from metadist.algorithms.losses import LossFunction, Objective
from metadist.episode import EpisodeBatch, Examples
from metadist.inner import Engine, FunctionalModel, Tensors, gradients

RATES = "log_inner_lr"
CARRIED = "carried/"
LARGEST = 10**9
"""Bytes of carried state above which a run is refused."""


class PES(ES):
    """Persistent evolution strategies (Vicol, Metz and Sohl-Dickstein 2021, algorithm 2), with antithetic pairs.

    An inner loop of ``horizon`` steps is cut into truncations of ``inner_steps``, one a meta-update. Each particle
    pair goes on from where its inner loops ``s+`` and ``s-`` stood, under perturbations ``+-sigma eps`` drawn anew,
    and remembers their sum ``xi``; with the losses of the truncation the gradient is
    ``1/(2 P sigma^2) sum_p xi_p (L+_p - L-_p)``. Unlike truncated ES (``xi`` of this truncation alone) it is unbiased
    for the whole horizon (section 4.1). After ``horizon`` steps the particles begin again with another task;
    microbatches do so at different times.

    The loss of a truncation is the mean, over its steps, of the query loss after each (the paper's sum of the losses
    of all steps, divided by their number). What is learned is the initialisation and, with ``learned_rate``, the
    logarithm of the inner learning rate, one number for each parameter tensor, in order, as ``log_inner_lr``. The
    initialisation acts at the first truncation alone, so that it is perturbed once in a horizon: what it is not
    exposed to would only add variance.

    The state of every particle lies among the meta-parameters (``carried/0003/plus`` for the fourth microbatch) and
    follows the rule ``replace``, so that it is checkpointed and any worker may go on with any microbatch. It holds
    3 P numbers for each parameter of the model and task of the meta-batch, travels with the meta-parameters to each
    worker and with each partial sum back. Four pairs for each of 16 tasks take, beside five steps of a perceptron's
    inner loop: with 1,800 parameters 1.4 MB and a tenth of a step's time, with 17,000 13 MB and a quarter, with
    67,000 51 MB and most of it, where this stops being sensible. More than 1 GB is refused.

    Metrics in training are those of the truncations' last steps, averaged over the particles: they mix young and
    old inner loops. Evaluation sets out from the initialisation for ``evaluation_inner_steps``.

    Args:
        inner_lr: step size of the inner loop, at the start where it is learned.
        inner_steps: steps of a truncation.
        horizon: steps of the whole inner loop, a multiple of ``inner_steps``.
        evaluation_inner_steps: steps in evaluation and use; None takes ``horizon``.
        learned_rate: learn the step sizes.
        sigma, pairs: as of :class:`ES`.
        loss, metric: as of :class:`MAML`.
    """

    def __init__(
        self,
        inner_lr: float = 0.01,
        inner_steps: int = 10,
        horizon: int = 100,
        evaluation_inner_steps: int | None = None,
        learned_rate: bool = True,
        sigma: float = 0.05,
        pairs: int = 8,
        loss: str | LossFunction = "auto",
        metric: str = "auto",
    ) -> None:
        steps = horizon if evaluation_inner_steps is None else evaluation_inner_steps
        super().__init__(inner_lr, inner_steps, steps, sigma, pairs, loss, metric)
        if horizon < 1 or horizon % inner_steps:
            raise ValueError(f"horizon must be a multiple of inner_steps ({inner_steps}), not {horizon}")
        self.learned_rate, self.horizon = learned_rate, horizon
        self.tasks_held_for = horizon // inner_steps

    def bind(self, model: FunctionalModel, objective: Objective, engine: Engine) -> Algorithm:
        super().bind(model, objective, engine)
        self._numbers = sum(v.numel() for v in model.initial_params().values())
        size = sum(self.plan.sizes) * self.pairs * sum(self._widths().values()) * model.dtype.itemsize
        if size > LARGEST:
            raise ValueError(
                f"its inner loops take {size / 1e9:.3g} GB to carry from one meta-update to the next "
                f"({self.pairs} pairs for each of {self.plan.tasks} tasks), more than {LARGEST / 1e9:.3g} GB; lower "
                "algorithm.pairs or outer.meta_batch_size, take a smaller model, or use type es"
            )
        return self

    # ----------------------------------------------------------------- what is learned, and what is carried

    def initial_meta_params(self) -> Tensors:
        params = super().initial_meta_params()
        like = params[self.parameter_names[0]]
        if self.learned_rate:
            params[RATES] = like.new_full((len(self.parameter_names),), math.log(self.inner_lr))
        return {**params, **{k: like.new_zeros(shape) for k, shape in self._shapes().items()}}

    def update_rules(self) -> dict[str, Rule]:
        return {**super().update_rules(), **{name: Rule("replace") for name in self._shapes()}}

    def _widths(self) -> dict[str, int]:
        """Numbers a particle pair carries: both inner states, and the perturbations' sum ``xi``."""
        rates = len(self.parameter_names) if self.learned_rate else 0
        return {"plus": self._numbers, "minus": self._numbers, "xi": self._numbers + rates}

    def _shapes(self) -> dict[str, tuple[int, int, int]]:
        """Of the carried tensors, ``[tasks, pairs, numbers]``, by name."""
        return {
            _name(m, part): (tasks, self.pairs, width)
            for m, tasks in enumerate(self.plan.sizes)
            for part, width in self._widths().items()
        }

    # ----------------------------------------------------------------- the inner loop

    def start(
        self, meta_params: Tensors, constants: Tensors, support: Examples, evaluation: bool
    ) -> tuple[dict[str, Any], Tensors]:
        shared, fast = super().start(meta_params, constants, support, evaluation)
        if self.learned_rate:
            shared["rates"] = dict(zip(self.parameter_names, meta_params[RATES].exp().unbind(), strict=True))
        return shared, fast

    def rate(self, shared: Any, name: str, k: int) -> float | Tensor:
        return shared["rates"][name] if self.learned_rate else super().rate(shared, name, k)

    # ----------------------------------------------------------------- a truncation

    def meta_gradient(self, meta_params: Tensors, batch: EpisodeBatch) -> TaskResults:
        noise = self.sigma * self.noise(batch, self.perturbed(meta_params))  # [T, P, D + rates]
        carried = self._resumed(meta_params, noise)
        turn = noise[..., self._numbers :].contiguous()
        tasks = (batch.support, batch.query, turn, *carried.values())
        with torch.no_grad():
            gradient, (metrics, seen, after) = self.engine.sum_tasks(self._truncation, (meta_params,), tasks)
        plus, minus = after[:, : self.pairs], after[:, self.pairs :]
        gradient |= self._handed_on({"plus": plus, "minus": minus, "xi": carried["xi"]})
        return self.results(meta_params, batch, gradient, metrics, seen)

    def _resumed(self, meta_params: Tensors, noise: Tensor) -> Tensors:
        """The particles' states ``plus`` and ``minus`` ``[T, P, D]`` as they begin; ``xi`` with this noise in it."""
        at = self._numbers
        if self.moment.starts(self.tasks_held_for):
            start, shift = flattened({k: meta_params[k] for k in self.parameter_names}), noise[..., :at]
            return {"plus": start + shift, "minus": start - shift, "xi": noise}
        here = slice(self.moment.place, self.moment.place + len(noise))
        kept = {part: meta_params[_name(self.moment.microbatch, part)][here] for part in self._widths()}
        fresh = torch.cat([torch.zeros_like(noise[..., :at]), noise[..., at:]], -1)
        return {**kept, "xi": kept["xi"] + fresh}

    def _handed_on(self, values: Tensors) -> Tensors:
        """The carried tensors of all microbatches: nought, of which the sum leaves alone what each adds of its own."""
        first = self.moment.place
        zero = next(iter(values.values())).new_zeros(())
        gradient = {name: zero.expand(shape) for name, shape in self._shapes().items()}
        for part, own in values.items():
            name = _name(self.moment.microbatch, part)
            # Added, not copied: -0.0 would come back from the sum as 0.0.
            gradient[name] = gradient[name].clone()
            gradient[name][first : first + len(own)] += own
        return gradient

    def _truncation(
        self, meta_params: Tensors, support: Examples, query: Examples,
        turn: Tensor, plus: Tensor, minus: Tensor, xi: Tensor,
    ) -> tuple[Tensors, tuple[Tensors, Tensors, Tensor]]:  # fmt: skip
        """One task's gradient.

        Args:
            turn: perturbations of the rates, ``[P, rates]``.
            plus, minus: inner states, ``[P, D]`` each.
            xi: sums of perturbations, ``[P, D + rates]``.

        Returns:
            The gradient; metrics, statistics and the new states ``[2 P, D]``.
        """

        def unrolled(
            state: Tensor, turn: Tensor, support: Examples, query: Examples
        ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
            turned = {RATES: meta_params[RATES] + turn} if self.learned_rate else {}
            shared, fast = self.start({**meta_params, **turned}, self.constants(), support, False)
            return self._unrolled(shared, unflattened(state, fast), support, query)

        sides = (torch.cat([plus, minus]), torch.cat([turn, -turn]))
        losses, after, metrics, seen = self.engine.map(unrolled, *sides, *repeated(2 * self.pairs, support, query))
        slope = (losses[: self.pairs] - losses[self.pairs :]) @ xi / (2 * self.pairs * self.sigma**2)
        mean_metrics, mean_seen = ({k: v.mean(0) for k, v in d.items()} for d in (metrics, seen))
        return unflattened(slope, self.perturbed(meta_params)), (mean_metrics, mean_seen, after)

    def _unrolled(
        self, shared: Any, fast: Tensors, support: Examples, query: Examples
    ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
        """Loss of a truncation, the state after it, and metrics and statistics of its last step."""
        total = torch.zeros(())
        for k in range(self.inner_steps):
            slope = gradients(lambda f: self.support_loss(shared, f, support, k, False), fast)  # noqa: B023
            fast, _ = self.update(shared, fast, slope, {}, k)
            with self.model.recording() as seen:
                output = self.output(self.params(shared, fast), support, query.x, k + 1, False)
            loss, metrics = self.judge(output, query)
            total = total.to(loss) + loss
        return total / self.inner_steps, flattened(fast), metrics, seen


def _name(microbatch: int, part: str) -> str:
    return f"{CARRIED}{microbatch:04d}/{part}"
