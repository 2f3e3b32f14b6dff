"""What a task is judged by: its loss, and the number a person reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """A differentiable loss and the metric that goes with it.

    Args:
        loss: ``loss(output [N, ...], target [N, ...])`` to a scalar.
        metric: the metric's name in logs, e.g. ``accuracy``.
        higher_is_better: which way the metric improves.
    """

    loss: LossFunction
    metric: str
    higher_is_better: bool

    def measure(self, output: Tensor, target: Tensor) -> Tensor:
        """The metric of ``output``: the share of right classes, or the loss itself."""
        if self.metric == "accuracy":
            return (output.argmax(-1) == target).to(output.dtype).mean()
        return self.loss(output, target)


CROSS_ENTROPY = Objective(F.cross_entropy, "accuracy", True)
MEAN_SQUARED_ERROR = Objective(F.mse_loss, "mean_squared_error", False)
_NAMED = {"cross_entropy": CROSS_ENTROPY, "mse": MEAN_SQUARED_ERROR}
_KNOWN_FUNCTIONS = {F.cross_entropy: CROSS_ENTROPY, F.mse_loss: MEAN_SQUARED_ERROR}


def resolve_objective(loss: str | LossFunction, target: Tensor) -> Objective:
    """The objective a loss stands for.

    Args:
        loss: ``auto``, ``cross_entropy``, ``mse`` or a function of (output, target). ``auto`` takes cross
            entropy for whole-number targets and squared error for others.
        target: the targets of any episode, for ``auto`` and for the metric of a function of your own.
    """
    integers = not target.is_floating_point()
    if isinstance(loss, str):
        return _NAMED.get(loss, CROSS_ENTROPY if integers else MEAN_SQUARED_ERROR)
    if loss in _KNOWN_FUNCTIONS:
        return _KNOWN_FUNCTIONS[loss]
    return Objective(loss, "accuracy", True) if integers else Objective(loss, "task_loss", False)
