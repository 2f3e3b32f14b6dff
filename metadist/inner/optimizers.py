"""What an inner step makes of a gradient: differentiable, and its own hyper-parameters may be learned.

Each starts anew with every task. Everything here is plain arithmetic on tensors, so that all strategies of the engine
differentiate through it, twice if need be, and with respect to the hyper-parameters as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metadist.inner.functional import Tensors

Number = float | Tensor
Moments = dict[str, Tensors]
"""What an optimizer remembers from step to step, by kind and by the name of the parameter."""


@dataclass(frozen=True)
class SGD:
    """The gradient itself.

    Args:
        learned: let the outer loop learn the step size, one number for all parameters.
    """

    learned: bool = False

    def fractions(self) -> dict[str, float]:
        """Hyper-parameters that lie between 0 and 1, and may be learned beside the step size."""
        return {}

    def __post_init__(self) -> None:
        for name, value in self.fractions().items():
            if not 0 <= value < 1:
                raise ValueError(f"inner_optimizer.{name} must be at least 0 and below 1, not {value}")
            if self.learned and value == 0:
                raise ValueError(
                    f"inner_optimizer.{name} is 0, from where it cannot be learned; set it above 0 or learned: false"
                )

    def hyperparameters(self) -> dict[str, float]:
        """What a run starts with where they are learned: fractions as logits, which keeps them fractions."""
        if not self.learned:
            return {}
        return {f"logit_{name}": math.log(p / (1 - p)) for name, p in self.fractions().items()}

    def start(self, fast: Tensors) -> Moments:
        """What it remembers before the first step."""
        return {}

    def direction(self, gradient: Tensors, moments: Moments, k: int, learned: Tensors) -> tuple[Tensors, Moments]:
        """Which way inner step ``k`` goes down, to be multiplied by the step size; and what is remembered after it.

        Args:
            gradient: of the support loss, by name.
            moments: what the step before left.
            k: number of the step, from 0.
            learned: the values of :meth:`hyperparameters`, where they are learned.
        """
        return gradient, moments

    def _fraction(self, name: str, learned: Tensors) -> Number:
        return learned[f"logit_{name}"].sigmoid() if self.learned else self.fractions()[name]


@dataclass(frozen=True)
class Momentum(SGD):
    """Heavy ball: ``m <- momentum m + g``, and the step goes along ``m`` (Polyak 1964), as torch.optim.SGD has it.

    Args:
        momentum: how much of the step before is kept, in [0, 1).
        nesterov: go along ``g + momentum m`` instead (Sutskever et al. 2013, equations 3 and 4, rewritten).
        learned: let the outer loop learn the momentum and the step size.
    """

    momentum: float = 0.9
    nesterov: bool = False

    def fractions(self) -> dict[str, float]:
        return {"momentum": self.momentum}

    def start(self, fast: Tensors) -> Moments:
        return {"mean": {name: torch.zeros_like(value) for name, value in fast.items()}}

    def direction(self, gradient: Tensors, moments: Moments, k: int, learned: Tensors) -> tuple[Tensors, Moments]:
        kept = self._fraction("momentum", learned)
        mean = {name: kept * moments["mean"][name] + g for name, g in gradient.items()}
        ahead = {name: g + kept * mean[name] for name, g in gradient.items()} if self.nesterov else mean
        return ahead, {"mean": mean}


@dataclass(frozen=True)
class Adam(SGD):
    """Steps of about the same size for every number (Kingma and Ba 2015, algorithm 1).

    ``eps`` stands under the root, ``m / sqrt(v + eps^2)``, so that the step can be differentiated where a gradient is
    nought, as those of units that a ReLU silences are. With gradients far above ``eps`` it is the paper's to rounding.

    Args:
        betas: how much of the mean gradient and of the mean squared gradient is kept, in [0, 1) both; Reptile takes 0
            for the first (Nichol et al. 2018, appendix A).
        eps: size of gradients below which steps shrink.
        learned: let the outer loop learn both betas and the step size.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def fractions(self) -> dict[str, float]:
        return {"beta1": self.betas[0], "beta2": self.betas[1]}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps > 0:
            raise ValueError(f"inner_optimizer.eps must be positive, not {self.eps}")

    def start(self, fast: Tensors) -> Moments:
        kinds = ("mean", "square") if self.betas[0] else ("square",)
        return {kind: {name: torch.zeros_like(value) for name, value in fast.items()} for kind in kinds}

    def direction(self, gradient: Tensors, moments: Moments, k: int, learned: Tensors) -> tuple[Tensors, Moments]:
        beta1, beta2 = self._fraction("beta1", learned), self._fraction("beta2", learned)
        square = {name: beta2 * moments["square"][name] + (1 - beta2) * g * g for name, g in gradient.items()}
        after: Moments = {"square": square}
        mean = gradient
        if self.betas[0]:
            after["mean"] = {name: beta1 * moments["mean"][name] + (1 - beta1) * g for name, g in gradient.items()}
            mean = {name: m / (1 - beta1 ** (k + 1)) for name, m in after["mean"].items()}
        unbiased = 1 - beta2 ** (k + 1)
        return {name: mean[name] / torch.sqrt(square[name] / unbiased + self.eps**2) for name in gradient}, after


InnerOptimizer = SGD | Momentum | Adam

OPTIMIZERS: dict[str, type[SGD]] = {"sgd": SGD, "momentum": Momentum, "adam": Adam}


def make_optimizer(type: str, **options: Any) -> InnerOptimizer:
    """The optimizer that a config names, with its options."""
    return OPTIMIZERS[type](**options)
