"""The simple neural attentive learner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metadist.algorithms.losses import LossFunction
from metadist.algorithms.sequence import SequenceLearner
from metadist.episode import Episode, Examples
from metadist.inner import Tensors
from metadist.models.snail import SNAIL as Network


class SNAIL(SequenceLearner):
    """Reads the support set, labels and all, and answers what is appended to it (Mishra et al. 2018, section 3).

    Each query example is the last step of a sequence of its own: the support set with its labels, then the
    query example without one. The meta-gradient is the derivative of the loss of these answers.

    Args:
        filters: numbers that each dense block of the temporal convolutions adds; 128 in the paper.
        attention_size: numbers of the first attention block's keys, twice those of its values; the other two blocks'
            are four and eight times as many. 64 in the paper.
        loss, metric: as of :class:`~metadist.algorithms.maml.MAML`.
    """

    wants_order = ("within_sets", "shuffled")

    def __init__(
        self, filters: int = 128, attention_size: int = 64, loss: str | LossFunction = "auto", metric: str = "auto"
    ) -> None:
        super().__init__(loss, metric)
        if filters < 1:
            raise ValueError(f"filters must be at least 1, not {filters}")
        if attention_size < 2:
            raise ValueError(f"attention_size must be at least 2, not {attention_size}")
        self.filters, self.attention_size = filters, attention_size

    def make_core(self, inputs: int, outputs: int, example: Episode) -> nn.Module:
        sizes = tuple((n * self.attention_size, n * self.attention_size // 2) for n in (1, 4, 8))
        return Network(inputs, outputs, len(example.support.x) + 1, self.filters, sizes)

    def adapt(self, meta_params: Tensors, support: Examples, *, evaluation: bool = False) -> Any:
        features = self.model(meta_params, support.x, evaluation=evaluation)
        return {"params": meta_params, "seen": torch.cat([features, self.labels(support.y, features)], -1)}

    def predict(self, adapted: Any, support: Examples, x: Tensor, *, evaluation: bool = False) -> Tensor:
        """Outputs ``[N, outputs]``."""
        last = self._unlabelled(adapted["params"], support, x, evaluation)
        before = adapted["seen"].expand(x.shape[0], *adapted["seen"].shape)
        return self.core(adapted["params"], torch.cat([before, last], 1))[:, -1]

    def predict_unadapted(self, meta_params: Tensors, support: Examples, x: Tensor, *, evaluation: bool) -> Tensor:
        """Outputs for a sequence of the one example."""
        return self.core(meta_params, self._unlabelled(meta_params, support, x, evaluation))[:, -1]

    def _unlabelled(self, params: Tensors, support: Examples, x: Tensor, evaluation: bool) -> Tensor:
        """Examples without labels as sequences of one step, ``[N, 1, inputs]``."""
        features = self.model(params, x, reference=support.x, evaluation=evaluation)
        return torch.cat([features, features.new_zeros(x.shape[0], self.outputs_of_example)], -1)[:, None]
