"""MAML made stable and fast to train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metadist.algorithms.losses import LossFunction
from metadist.algorithms.maml import MAML
from metadist.algorithms.meta_sgd import RATES
from metadist.episode import Examples
from metadist.inner import Tensors
from metadist.inner.optimizers import InnerOptimizer


class MAMLPlusPlus(MAML):
    """MAML++ (Antoniou et al. 2019, section 4), each of its parts to be switched alone.

    Per-step BatchNorm statistics are the mode ``running`` of the model, and the cosine outer rate the
    schedule of the outer loop.

    Args:
        learned_rates: learn an inner rate for each layer and step, the meta-parameters ``inner_lr/LAYER [K]``; steps
            beyond K in evaluation take the last one's.
        multi_step_loss_updates: meta-updates over which the objective goes from the mean of the query losses after
            each inner step to the last one alone, linearly; 0 for the last alone from the start.
        first_order_updates: meta-updates made with first-order gradients before second order sets in.
        per_step_norm: a weight and bias of each BatchNorm for each inner step, which the inner loop does not change.
        others: as of :class:`MAML`.
    """

    def __init__(
        self,
        inner_lr: float = 0.01,
        inner_steps: int = 5,
        evaluation_inner_steps: int | None = None,
        learned_rates: bool = True,
        multi_step_loss_updates: int = 1000,
        first_order_updates: int = 0,
        per_step_norm: bool = True,
        loss: str | LossFunction = "auto",
        metric: str = "auto",
        inner_optimizer: InnerOptimizer | None = None,
    ) -> None:
        super().__init__(inner_lr, inner_steps, evaluation_inner_steps, False, loss, metric, inner_optimizer)
        for name, count in (
            ("multi_step_loss_updates", multi_step_loss_updates), ("first_order_updates", first_order_updates),
        ):  # fmt: skip
            if count < 0:
                raise ValueError(f"{name} must be at least 0, not {count}")
        self.learned_rates, self.per_step_norm = learned_rates, per_step_norm
        self.multi_step_loss_updates, self.first_order_updates = multi_step_loss_updates, first_order_updates

    def judges_every_step(self) -> bool:
        return self.inner_steps > 1 and self.moment.version < self.multi_step_loss_updates

    def is_first_order(self) -> bool:
        return self.moment.version < self.first_order_updates

    def initial_meta_params(self) -> Tensors:
        params = super().initial_meta_params()
        if self.per_step_norm:
            params |= {k: params[k].repeat(self.inner_steps + 1, 1) for k in self._norm_params()}
        if self.learned_rates:
            like = params[self.parameter_names[0]]
            params |= {RATES + n: like.new_full((self.inner_steps,), self.inner_lr) for n in self._layers()}
        return params

    def adapts(self, name: str) -> bool:
        return not (self.per_step_norm and name in self._norm_params())

    def start(
        self, meta_params: Tensors, constants: Tensors, support: Examples, evaluation: bool
    ) -> tuple[dict[str, Any], Tensors]:
        shared, fast = super().start(meta_params, constants, support, evaluation)
        if self.learned_rates:
            shared["rates"] = {n: meta_params[RATES + n] for n in self._layers()}
        return shared, fast

    def rate(self, shared: Any, name: str, k: int) -> float | Tensor:
        if not self.learned_rates:
            return super().rate(shared, name, k)
        return shared["rates"][_layer(name)][min(k, self.inner_steps - 1)]

    def has_rates(self) -> bool:
        return self.learned_rates

    def constants(self) -> Tensors:
        weights = step_weights(self.inner_steps, self.moment.version, self.multi_step_loss_updates)
        return {"step_weights": weights.to(self.model.device, self.model.dtype)}

    def weighed(self, shared: Any, loss: Tensor, k: int) -> Tensor:
        # The weights are data, not code: a compiled step serves every version.
        return shared["constants"]["step_weights"][k - 1] * loss if self.judges_every_step() else loss

    def _layers(self) -> list[str]:
        return list(dict.fromkeys(_layer(k) for k in self.parameter_names if self.adapts(k)))

    def _norm_params(self) -> set[str]:
        names = {f"{n.name}.{part}" for n in self.model.norms for part in ("weight", "bias")}
        return names & set(self.parameter_names)


def step_weights(steps: int, version: int, updates: int) -> Tensor:
    """Parts ``[K]`` of the query losses after each inner step (Antoniou et al. 2019, equation 3).

    Args:
        steps: inner steps K.
        version: meta-updates made.
        updates: meta-updates over which the mean turns into the last step alone.
    """
    gone = min(1.0, version / updates) if updates else 1.0
    weights = torch.full((steps,), (1 - gone) / steps)
    weights[-1] += gone
    return weights


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name
