"""BatchNorm in episodes: whose statistics normalise whom.

A few-shot result depends by points on this choice, so it is one word of the config and stands in every
evaluation (Bronskill et al. 2020, "TaskNorm", for a comparison):

``transductive``
    Every set is normalised by its own statistics; the examples of a query set are thus judged together.
``inductive``
    The query set is normalised by the statistics of the support set, so that each of its examples is
    judged alone.
``running``
    Each set by its own statistics while learning, by running averages over the tasks of training in
    evaluation and in use. One average for each inner step (Antoniou et al. 2019, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BatchNormMode = Literal["transductive", "inductive", "running"]

MEAN, VAR = ".running_mean", ".running_var"


@dataclass
class Pass:
    """What one forward pass asks of every BatchNorm of a model.

    Args:
        reference: leading examples whose statistics normalise all of them; 0 for all.
        step: inner step, which picks the row of per-step weights and running statistics.
        stored: normalise by the running statistics.
        seen: receives each BatchNorm's statistics of the batch, ``[channels]``, by name.
    """

    reference: int = 0
    step: int = 0
    stored: bool = False
    seen: dict[str, Tensor] | None = None


class EpisodeNorm(nn.Module):
    """Stands in for a BatchNorm, whose parameters it takes over.

    Weight and bias may also be given as ``[steps, channels]``: a row for each inner step, of which the
    last holds for all later ones. So may the running statistics.

    Args:
        norm: the BatchNorm.
        name: its name in the model.
        running: whether there are running statistics.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, name: str, running: bool) -> None:
        super().__init__()
        self.name, self.eps, self.channels = name, norm.eps, norm.num_features
        self.momentum = 0.1 if norm.momentum is None else norm.momentum
        self.weight, self.bias = norm.weight, norm.bias
        if running:
            self.register_buffer("running_mean", torch.zeros(1, self.channels))
            self.register_buffer("running_var", torch.ones(1, self.channels))
        self.now = Pass()

    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        now = self.now
        weight, bias = _row(self.weight, now.step), _row(self.bias, now.step)
        if now.stored:
            # Statistics are observed, not learned: an inner loop over all meta-parameters finds no slope here.
            mean, var = (_row(s.detach(), now.step) for s in (self.running_mean, self.running_var))
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        others = [0, *range(2, x.dim())]
        if now.seen is not None:
            var, mean = torch.var_mean(x.detach(), others)
            now.seen[self.name + MEAN], now.seen[self.name + VAR] = mean, var
        if not now.reference:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        var, mean = torch.var_mean(x[: now.reference], others, correction=0, keepdim=True)
        x = (x - mean) * torch.rsqrt(var + self.eps)
        if weight is None or bias is None:
            return x
        along = [1, -1] + [1] * (x.dim() - 2)
        return x * weight.view(along) + bias.view(along)


def adopt_batchnorm(module: nn.Module, mode: BatchNormMode) -> list[EpisodeNorm]:
    """Replaces every BatchNorm below ``module`` in place; returns what stands there now."""
    found = []
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            if not name:
                raise ValueError("the model is a single BatchNorm; wrap it in nn.Sequential")
            norm = EpisodeNorm(child, name, mode == "running")
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, norm)
            found.append(norm)
    return found


def _row(values: Tensor | None, step: int) -> Tensor | None:
    if values is None or values.dim() == 1:
        return values
    return values[min(step, values.shape[0] - 1)]
