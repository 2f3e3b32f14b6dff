"""Almost no inner loop: only the last layer adapts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metadist.algorithms.base import Algorithm
from metadist.algorithms.heads import find_head
from metadist.algorithms.losses import LossFunction, Objective
from metadist.algorithms.maml import MAML
from metadist.episode import Episode, Examples
from metadist.inner import Engine, FunctionalModel, Tensors
from metadist.inner.optimizers import InnerOptimizer


class HeadAndBody(MAML):
    """MAML that treats the model's last layer and the rest apart.

    Args:
        head: name of the last layer; None takes the linear layer defined last.
        others: as of :class:`MAML`.
    """

    def __init__(
        self,
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        evaluation_inner_steps: int | None = None,
        first_order: bool = False,
        head: str | None = None,
        loss: str | LossFunction = "auto",
        metric: str = "auto",
        inner_optimizer: InnerOptimizer | None = None,
    ) -> None:
        super().__init__(inner_lr, inner_steps, evaluation_inner_steps, first_order, loss, metric, inner_optimizer)
        self.head = head

    def prepare(self, module: nn.Module, example: Episode) -> nn.Module:
        self._head = find_head(module, self.head, example)
        return module

    def bind(self, model: FunctionalModel, objective: Objective, engine: Engine) -> Algorithm:
        model.cut_at(self._head)
        return super().bind(model, objective, engine)


class ANIL(HeadAndBody):
    """MAML whose inner loop changes the last layer alone (Raghu et al. 2020, section 4).

    The body's features of the support set are computed once, whatever the number of inner steps, and the
    meta-gradient goes through them: it is exactly that of MAML with the body's inner rate set to zero.
    """

    def adapts(self, name: str) -> bool:
        return name in self.model.head_params

    def start(
        self, meta_params: Tensors, constants: Tensors, support: Examples, evaluation: bool
    ) -> tuple[dict[str, Any], Tensors]:
        shared, fast = super().start(meta_params, constants, support, evaluation)
        shared["features"] = self.model.features(shared["params"], support.x, evaluation=evaluation)
        return shared, fast

    def predict_unadapted(self, meta_params: Tensors, support: Examples, x: Tensor, *, evaluation: bool) -> Tensor:
        # What the inner loop would set out from is not needed: no features of the support set.
        return self.output(meta_params, support, x, 0, evaluation)

    def support_loss(self, shared: Any, fast: Tensors, support: Examples, k: int, evaluation: bool) -> Tensor:
        return self.objective.loss(self.model.classify(fast, shared["features"]), support.y)
