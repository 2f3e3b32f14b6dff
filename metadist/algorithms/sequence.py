"""Learners that read a task as a sequence of examples: nothing adapts but the state of a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metadist.algorithms.base import Algorithm
from metadist.algorithms.heads import one_hot
from metadist.algorithms.losses import LossFunction, outputs_for, right
from metadist.episode import Episode
from metadist.inner import Tensors
from metadist.tasks.sequences import LETTERS

INSTANCE = "accuracy_instance_"
"""Begins the name of the accuracy when a class is shown for the n-th time; n follows."""

_CORE = "core"


class SequenceModel(nn.Module):
    """An embedding of inputs, and the network that reads sequences of what it makes.

    Its own call embeds: input ``[N, ...]``, output ``[N, features]``. Learners call ``core`` themselves.
    """

    def __init__(self, embedding: nn.Module, core: nn.Module) -> None:
        super().__init__()
        self.embedding, self.core = embedding, core

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x).flatten(1)


class SequenceLearner(Algorithm):
    """What black-box learners have in common: examples become inputs of a network, targets inputs and outputs.

    The model of the config is an embedding. Targets may be class numbers, strings of letters or numbers;
    how many classes there are is fixed by the first episode seen.
    """

    wants = "features"

    def __init__(self, loss: str | LossFunction = "auto", metric: str = "auto") -> None:
        self.loss, self.metric = loss, metric

    def make_core(self, inputs: int, outputs: int, example: Episode) -> nn.Module:
        """The network that reads sequences.

        Args:
            inputs: numbers of an input: an example's features and its label.
            outputs: numbers of an output.
            example: an episode, for the length of sequences.
        """
        raise TypeError(f"{type(self).__name__} must define make_core(self, inputs, outputs, example)")

    def prepare(self, module: nn.Module, example: Episode) -> nn.Module:
        y = torch.cat([example.support.y, example.query.y])
        # A label takes as many inputs as it takes outputs: scores of the same classes, letters or numbers.
        self.outputs_of_example = outputs_for(y)
        with torch.no_grad():
            features = module(example.support.x).flatten(1).shape[1]
        core = self.make_core(features + self.outputs_of_example, self.outputs_of_example, example)
        return SequenceModel(module, core)

    # ----------------------------------------------------------------- parts of a sequence

    def labels(self, y: Tensor, like: Tensor) -> Tensor:
        """Targets as inputs, ``[N, labels]`` in the dtype of ``like``."""
        if y.is_floating_point():
            return y.reshape(len(y), -1).to(like.dtype)
        if y.dim() > 1:
            return one_hot(y.flatten(), LETTERS, like).reshape(len(y), -1)
        return one_hot(y, self.outputs_of_example, like)

    def core(self, params: Tensors, *args: Any) -> Any:
        """Calls the network that reads sequences."""
        return self.model.part(_CORE, params, *args)


def instances(y: Tensor) -> Tensor:
    """For each example of a sequence, how many times its class has been shown by then, itself included.

    Args:
        y: class numbers ``[T, N]`` or strings of letters ``[T, N, places]``.

    Returns:
        int64 ``[T, N]``, from 1.
    """
    y = y.reshape(*y.shape[:2], -1)
    same = (y[:, :, None] == y[:, None]).all(-1)
    return torch.tril(same.long()).sum(-1)


def accuracy_by_instance(output: Tensor, y: Tensor) -> Tensors:
    """The share of right answers at the n-th time that a class is shown (Santoro et al. 2016, figure 2).

    Args:
        output: of every step, ``[T, N, outputs]``.
        y: whole-number targets, ``[T, N]`` or ``[T, N, places]``.

    Returns:
        ``accuracy_instance_1`` and so on, ``[T]`` each, as often as the first task shows its classes on average; not
        a number where a task has no such instance.
    """
    hits = right(output.flatten(0, 1), y.flatten(0, 1)).reshape(y.shape[:2])
    nth = instances(y)
    classes = int((nth[0] == 1).sum())
    shown = [(nth == n).to(hits.dtype) for n in range(1, y.shape[1] // classes + 1)]
    return {f"{INSTANCE}{n}": (hits * mask).sum(1) / mask.sum(1) for n, mask in enumerate(shown, 1)}
