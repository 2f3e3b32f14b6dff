"""MAML whose last layer sets out from the prototypes of the classes."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from metadist.algorithms.anil import HeadAndBody
from metadist.algorithms.base import Algorithm
from metadist.algorithms.heads import class_means, require_classes
from metadist.episode import Episode, Examples
from metadist.inner import Tensors


class ProtoMAML(HeadAndBody):
    """MAML from a prototypical classifier (Triantafillou et al. 2020, section 3).

    With ``c_n`` the mean feature of class n, the last layer starts each task with weight ``2 c_n`` and
    bias ``-|c_n|^2``, which makes its scores those of a prototypical network; then body and last layer
    adapt by gradient steps. The meta-gradient goes through the prototypes. "Before adaptation" is here
    the prototypical classifier before the first step.

    Wants whole-number targets and a linear last layer with a bias.
    """

    any_ways = True  # the last layer is made of the support set, and nothing of it is learned

    def prepare(self, module: nn.Module, example: Episode) -> nn.Module:
        module = super().prepare(module, example)
        head = module.get_submodule(self._head)
        if not isinstance(head, nn.Linear) or head.bias is None:
            raise ValueError(
                f"protomaml starts from prototypes, so the last layer {self._head!r} must be linear, with a bias"
            )
        require_classes("protomaml", example)
        self._ways = head.out_features
        return module

    def with_ways(self, ways: int) -> Algorithm:
        if ways == self._ways:
            return self
        other = copy.copy(self)  # without the inner loops of another number of classes
        other._ways = ways
        return other

    def initial_meta_params(self) -> Tensors:
        return {k: v for k, v in super().initial_meta_params().items() if k not in self.model.head_params}

    def start(
        self, meta_params: Tensors, constants: Tensors, support: Examples, evaluation: bool
    ) -> tuple[dict[str, Any], Tensors]:
        features = self.model.features(meta_params, support.x, evaluation=evaluation)
        means = class_means(features, support.y, self._ways)
        head: Tensors = {f"{self._head}.weight": 2 * means, f"{self._head}.bias": -(means**2).sum(-1)}
        return super().start({**meta_params, **head}, constants, support, evaluation)
