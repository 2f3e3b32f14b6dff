"""Adaptation of a small context that modulates the network."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from metadist.algorithms.losses import LossFunction
from metadist.algorithms.maml import MAML
from metadist.episode import Episode, Examples
from metadist.inner import Tensors
from metadist.inner.optimizers import InnerOptimizer

CONTEXT = "context"


class ContextModulated(nn.Module):
    """A network one of whose layers is shifted and scaled by a linear function of a context vector.

    With ``modulation`` ``shift`` the layer's output becomes ``h + W c``, which for the first layer of a
    perceptron is the same as feeding it the context as further inputs (Zintgraf et al. 2019, section 3.1);
    with ``film`` it becomes ``(1 + W c) h + V c + b`` (section 3.4, after Perez et al. 2018).

    Args:
        module: the network.
        layer: name of the layer.
        channels: of the layer's output, its second dimension.
        context_size: numbers of the context.
        modulation: ``shift`` or ``film``.
    """

    def __init__(self, module: nn.Module, layer: str, channels: int, context_size: int, modulation: str) -> None:
        super().__init__()
        self.module, self.modulation, self.channels = module, modulation, channels
        self.modulate = nn.Linear(context_size, channels * (2 if modulation == "film" else 1), bias=False)
        self.context = nn.Parameter(torch.zeros(context_size))
        module.get_submodule(layer).register_forward_hook(self._hook)

    def _hook(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        values = self.modulate(self.context)
        shape = [1, self.channels] + [1] * (output.dim() - 2)
        if self.modulation == "shift":
            return output + values.view(shape)
        scale, shift = values[: self.channels], values[self.channels :]
        return output * (1 + scale.view(shape)) + shift.view(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class CAVIA(MAML):
    """Fast context adaptation (Zintgraf et al. 2019, algorithm 1): the inner loop changes a context alone.

    The context starts at zero for every task and modulates one layer; all other parameters are shared
    by the tasks and move in the outer loop only, so that adaptation is small and hard to overfit.

    Args:
        context_size: numbers of the context.
        layer: name of the layer it modulates; None takes the first with weights.
        modulation: ``shift`` (added to the layer's output) or ``film`` (scales it as well).
        others: as of :class:`MAML`.
    """

    def __init__(
        self,
        inner_lr: float = 1.0,
        inner_steps: int = 1,
        evaluation_inner_steps: int | None = None,
        first_order: bool = False,
        context_size: int = 5,
        layer: str | None = None,
        modulation: Literal["shift", "film"] = "shift",
        loss: str | LossFunction = "auto",
        metric: str = "auto",
        inner_optimizer: InnerOptimizer | None = None,
    ) -> None:
        super().__init__(inner_lr, inner_steps, evaluation_inner_steps, first_order, loss, metric, inner_optimizer)
        if context_size < 1:
            raise ValueError(f"context_size must be at least 1, not {context_size}")
        if modulation not in ("shift", "film"):
            raise ValueError(f"modulation must be shift or film, not {modulation!r}")
        self.context_size, self.layer, self.modulation = context_size, layer, modulation

    def prepare(self, module: nn.Module, example: Episode) -> nn.Module:
        layers = [n for n, m in module.named_modules() if n and next(m.parameters(recurse=False), None) is not None]
        if not layers:
            raise ValueError("cavia needs a model with a layer below its top to modulate; wrap it in nn.Sequential")
        layer = self.layer or layers[0]
        if layer not in layers:
            raise ValueError(f"layer: the model has no layer {layer!r} with weights; choose one of {', '.join(layers)}")
        shape: list[int] = []
        hook = module.get_submodule(layer).register_forward_hook(lambda m, i, o: shape.extend(o.shape))
        with torch.no_grad():
            module(example.support.x)
        hook.remove()
        return ContextModulated(module, layer, shape[1], self.context_size, self.modulation)

    def initial_meta_params(self) -> Tensors:
        return {k: v for k, v in super().initial_meta_params().items() if k != CONTEXT}

    def adapts(self, name: str) -> bool:
        return name == CONTEXT

    def start(
        self, meta_params: Tensors, constants: Tensors, support: Examples, evaluation: bool
    ) -> tuple[dict[str, Any], Tensors]:
        like = next(iter(meta_params.values()))
        return super().start(
            {**meta_params, CONTEXT: like.new_zeros(self.context_size)}, constants, support, evaluation
        )
