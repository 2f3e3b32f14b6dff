"""Memory-augmented neural networks."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from metadist.algorithms.base import TaskResults
from metadist.algorithms.losses import LossFunction
from metadist.algorithms.sequence import SequenceLearner, accuracy_by_instance
from metadist.episode import Episode, EpisodeBatch, Examples
from metadist.inner import Tensors
from metadist.models.mann import MANN as Cell


class MANN(SequenceLearner):
    """Learns to bind what it sees to labels in an external memory (Santoro et al. 2016).

    Support and query sets are one sequence. At each step the network sees an input and the *label of the step
    before*, and says the input's label before it is told (section 2 and figure 1a). The meta-gradient is the slope
    of the mean loss over all steps; the metric is that of the query set, the tail of the sequence, and
    ``accuracy_instance_n`` that of all examples shown for the n-th time. Adapted to a task is the state after the
    support set, from which every query example is answered by itself.

    Args:
        controller: ``lstm`` or ``feedforward``.
        controller_size: numbers of its state.
        memory: ``lrua`` (least recently used access, section 3.2) or ``none``: the LSTM that the paper compares with.
        memory_slots: rows of the memory.
        memory_width: numbers of a row.
        read_heads: reads of a step; each head writes as well.
        usage_decay: of the slots' usage from step to step, gamma of equation 5.
        sharpness: factor of the cosine similarities before the softmax; 1 in the paper, with which no slot can get more
            than seven times the weight of any other.
        loss, metric: as of :class:`~metadist.algorithms.maml.MAML`.
    """

    exact = False
    wants_order = ("shuffled",)
    takes_outsiders = False

    def __init__(
        self,
        controller: Literal["lstm", "feedforward"] = "lstm",
        controller_size: int = 200,
        memory: Literal["lrua", "none"] = "lrua",
        memory_slots: int = 128,
        memory_width: int = 40,
        read_heads: int = 4,
        usage_decay: float = 0.99,
        sharpness: float = 10.0,
        loss: str | LossFunction = "auto",
        metric: str = "auto",
    ) -> None:
        super().__init__(loss, metric)
        for name, value, known in (("controller", controller, ("lstm", "feedforward")),
                                   ("memory", memory, ("lrua", "none"))):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, not {value!r}")
        if not 1 <= read_heads <= memory_slots:
            raise ValueError(f"read_heads must be 1 to memory_slots ({memory_slots}), not {read_heads}")
        if not 0 <= usage_decay <= 1:
            raise ValueError(f"usage_decay must be between 0 and 1, not {usage_decay}")
        sizes = memory_slots, memory_width, read_heads
        self.options = (controller, controller_size, memory, *sizes, usage_decay, sharpness)

    def make_core(self, inputs: int, outputs: int, example: Episode) -> nn.Module:
        return Cell(inputs, outputs, *self.options)

    # ----------------------------------------------------------------- one task, in use

    def adapt(self, meta_params: Tensors, support: Examples, *, evaluation: bool = False) -> Any:
        features = self.model(meta_params, support.x, evaluation=evaluation)[None]
        labels = self.labels(support.y, features)[None]
        _, state = self.core(meta_params, torch.cat([features, _delayed(labels)], -1))
        return {"params": meta_params, "state": state, "label": labels[:, -1]}

    def predict(self, adapted: Any, support: Examples, x: Tensor, *, evaluation: bool = False) -> Tensor:
        """Outputs ``[N, outputs]``, each example the next step of a sequence of its own."""
        state = {k: v.expand(x.shape[0], *v.shape[1:]) for k, v in adapted["state"].items()}
        features = self.model(adapted["params"], x, reference=support.x, evaluation=evaluation)
        inputs = torch.cat([features, adapted["label"].expand(x.shape[0], -1)], -1)
        return self.core(adapted["params"], inputs[:, None], state)[0][:, 0]

    def predict_unadapted(self, meta_params: Tensors, support: Examples, x: Tensor, *, evaluation: bool) -> Tensor:
        """Outputs for a first step: nothing has been seen and no label told."""
        features = self.model(meta_params, x, reference=support.x, evaluation=evaluation)
        no_label = features.new_zeros(len(x), self.outputs_of_example)
        return self.core(meta_params, torch.cat([features, no_label], -1)[:, None])[0][:, 0]

    # ----------------------------------------------------------------- many tasks, in sequence

    def meta_gradient(self, meta_params: Tensors, batch: EpisodeBatch) -> TaskResults:
        gradient, (outputs, seen) = self.engine.sum_batch(
            self._learn, (meta_params,), (batch.support, batch.query), key="sequences"
        )
        return self.results(meta_params, batch, gradient, self._judged(outputs, batch), seen)

    def evaluate(self, meta_params: Tensors, batch: EpisodeBatch) -> Tensors:
        with torch.no_grad():
            outputs, _ = self._answers(meta_params, batch.support, batch.query, evaluation=True)
        return {**self._judged(outputs, batch), **self.before_adaptation(meta_params, batch, evaluation=True)}

    def _learn(self, meta_params: Tensors, support: Examples, query: Examples) -> tuple[Tensors, Any]:
        """The gradient of the summed losses of T tasks; their outputs and the statistics of BatchNorm.

        Nothing is differentiated twice here, so plain autograd does.
        """
        leaves = {k: v.detach().requires_grad_() for k, v in meta_params.items()}
        with torch.enable_grad():
            outputs, seen = self._answers(leaves, support, query)
            losses = self.engine.map(self.objective.loss, outputs, torch.cat([support.y, query.y], 1))
            values = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, values, strict=True)), (outputs.detach(), seen)

    def _answers(
        self, params: Tensors, support: Examples, query: Examples, evaluation: bool = False
    ) -> tuple[Tensor, Tensors]:
        """Outputs of every step of T tasks, ``[T, S + Q, outputs]``, each from what came before it."""

        def embed(support_x: Tensor, query_x: Tensor) -> tuple[Tensor, Tensors]:
            with self.model.recording() as seen:
                one = self.model(params, support_x, evaluation=evaluation)
                other = self.model(params, query_x, reference=support_x, evaluation=evaluation)
            return torch.cat([one, other]), dict(seen)

        features, seen = self.engine.map(embed, support.x, query.x)
        y = torch.cat([support.y, query.y], 1)
        labels = self.labels(y.flatten(0, 1), features).reshape(*y.shape[:2], -1)
        return self.core(params, torch.cat([features, _delayed(labels)], -1))[0], seen

    def _judged(self, outputs: Tensor, batch: EpisodeBatch) -> Tensors:
        """The loss of all steps, the metric of the query set, and the accuracy by instance; ``[T]`` each."""
        y = torch.cat([batch.support.y, batch.query.y], 1)
        tail = outputs[:, batch.support.y.shape[1] :]
        metrics = {
            "loss": self.engine.map(self.objective.loss, outputs, y),
            self.objective.metric: self.engine.map(self.objective.measure, tail, batch.query.y),
        }
        return metrics if y.is_floating_point() else {**metrics, **accuracy_by_instance(outputs, y)}


def _delayed(labels: Tensor) -> Tensor:
    """``labels [T, N, L]`` one step later: nothing at first, the last one left out."""
    return torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], 1)
