"""What a task is judged by: its loss, and the number a person reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.tasks.outsiders import OUTSIDE
from metadist.tasks.sequences import LETTERS

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """A differentiable loss and the metric that goes with it.

    Args:
        loss: ``loss(output [N, ...], target [N, ...])`` to a scalar.
        metric: the metric's name in logs, e.g. ``accuracy``.
        measure: the metric, ``measure(output, target)`` to a scalar.
        higher_is_better: which way the metric improves.
    """

    loss: LossFunction
    metric: str
    measure: LossFunction
    higher_is_better: bool


def string_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of labels that are strings of letters, the mean over their places.

    Args:
        output: ``[N, places * LETTERS]``, scores of each letter at each place.
        target: int64 ``[N, places]``.
    """
    places = target.shape[-1]
    return F.cross_entropy(output.reshape(-1, LETTERS), target.reshape(-1)) if places else output.sum() * 0


def right(output: Tensor, target: Tensor) -> Tensor:
    """Which examples are classified right, ``[N]`` of 0 and 1.

    A target of floats is a probability: right if the sign of the output tells its side of one half. A
    string of letters is right if all of them are.
    """
    if target.is_floating_point():
        return ((output > 0) == (target > 0.5)).to(output.dtype).reshape(len(target), -1).mean(-1)
    if target.dim() > 1:
        read = output.reshape(*target.shape, LETTERS).argmax(-1)
        return (read == target).all(-1).to(output.dtype)
    return (output.argmax(-1) == target).to(output.dtype)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """The share of examples classified :func:`right`; those of no class are left out."""
    if target.is_floating_point() or target.dim() > 1:
        return right(output, target).mean()
    inside = (target != OUTSIDE).to(output.dtype)
    return (right(output, target) * inside).sum() / inside.sum()


def outsiders_auroc(output: Tensor, target: Tensor) -> Tensor:
    """The chance that an example of a task's classes is answered with more confidence than an outsider.

    Confidence is the largest probability of a class (Hendrycks and Gimpel 2017).

    Args:
        output: ``[N, classes]``, logits.
        target: int64 ``[N]``, :data:`~metadist.tasks.outsiders.OUTSIDE` for outsiders.
    """
    confidence = F.log_softmax(output, -1).amax(-1)
    return auc(confidence, (target != OUTSIDE).to(output.dtype))


def auc(output: Tensor, target: Tensor) -> Tensor:
    """The chance that a positive example scores higher than a negative one, a tie counting half.

    Args:
        output: ``[N]`` or ``[N, 1]``, one score an example; or ``[N, 2]``, of which the difference counts.
        target: ``[N]`` or ``[N, 1]``, above one half for positive examples.

    Returns:
        The area under the receiver operating characteristic; one half where a side is missing.
    """
    score = output[..., 1] - output[..., 0] if output.dim() > 1 and output.shape[-1] == 2 else output
    score, positive = score.reshape(-1), (target.reshape(-1) > 0.5).to(output.dtype)
    pairs = positive[:, None] * (1 - positive)[None]
    difference = score[:, None] - score[None]
    wins = (difference > 0).to(output.dtype) + 0.5 * (difference == 0).to(output.dtype)
    count = pairs.sum()
    return torch.where(count > 0, (pairs * wins).sum() / count.clamp(min=1), torch.full_like(count, 0.5))


def ndcg(output: Tensor, target: Tensor) -> Tensor:
    """Normalised discounted cumulative gain of the order in which the outputs put the examples.

    A target ``r`` in place ``p`` gains ``(2 ** r - 1) / log2(1 + p)``; divided by the most that any order gains
    (Järvelin and Kekäläinen 2002; the exponential gain is that of Burges et al. 2005). Equal outputs are taken in turn.

    Args:
        output: ``[N]`` or ``[N, 1]``.
        target: ``[N]`` or ``[N, 1]``, at least zero.
    """
    score, gain = output.reshape(-1), torch.exp2(target.reshape(-1)) - 1
    discount = torch.log2(torch.arange(len(score), device=score.device, dtype=gain.dtype) + 2)
    found = (gain.gather(0, score.argsort(descending=True, stable=True)) / discount).sum()
    best = (gain.sort(descending=True).values / discount).sum()
    return torch.where(best > 0, found / best, torch.ones_like(best))


CROSS_ENTROPY = Objective(F.cross_entropy, "accuracy", accuracy, True)
STRING_CROSS_ENTROPY = Objective(string_cross_entropy, "accuracy", accuracy, True)
BINARY_CROSS_ENTROPY = Objective(F.binary_cross_entropy_with_logits, "accuracy", accuracy, True)
MEAN_SQUARED_ERROR = Objective(F.mse_loss, "mean_squared_error", F.mse_loss, False)

_NAMED = {"cross_entropy": CROSS_ENTROPY, "binary_cross_entropy": BINARY_CROSS_ENTROPY, "mse": MEAN_SQUARED_ERROR}
_KNOWN_FUNCTIONS = {
    F.cross_entropy: CROSS_ENTROPY,
    F.binary_cross_entropy_with_logits: BINARY_CROSS_ENTROPY,
    F.mse_loss: MEAN_SQUARED_ERROR,
    string_cross_entropy: STRING_CROSS_ENTROPY,
}
METRICS: dict[str, tuple[LossFunction, bool]] = {
    "accuracy": (accuracy, True),
    "auc": (auc, True),
    "mean_squared_error": (F.mse_loss, False),
    "mean_absolute_error": (F.l1_loss, False),
    "ndcg": (ndcg, True),
}


def resolve_objective(loss: str | LossFunction, target: Tensor, metric: str = "auto") -> Objective:
    """The objective a loss and a metric stand for.

    Args:
        loss: ``auto``, ``cross_entropy``, ``binary_cross_entropy`` (of logits), ``mse`` or a function of
            (output, target). ``auto`` takes squared error for targets of floats and cross entropy for whole
            numbers: of classes for ``[N]``, of strings of letters for ``[N, places]``.
        target: the targets of any episode, for ``auto`` and for the metric of a function of your own.
        metric: one of :data:`METRICS`, or ``auto`` for the one that goes with the loss; that of
            a function of your own is the accuracy for whole-number targets, else its own value, ``task_loss``.
    """
    integers = not target.is_floating_point()
    strings = integers and target.dim() > 1
    if loss == "auto":
        chosen = STRING_CROSS_ENTROPY if strings else CROSS_ENTROPY if integers else MEAN_SQUARED_ERROR
    elif isinstance(loss, str):
        if loss not in _NAMED:
            raise ValueError(f"loss must be auto, {', '.join(_NAMED)} or a function of (output, target), not {loss!r}")
        chosen = STRING_CROSS_ENTROPY if strings and loss == "cross_entropy" else _NAMED[loss]
    elif loss in _KNOWN_FUNCTIONS:
        chosen = _KNOWN_FUNCTIONS[loss]
    else:
        chosen = Objective(loss, "accuracy", accuracy, True) if integers else Objective(loss, "task_loss", loss, False)
    if metric == "auto":
        return chosen
    if metric not in METRICS:
        raise ValueError(f"metric must be auto, {', '.join(METRICS)}, not {metric!r}")
    measure, higher = METRICS[metric]
    return replace(chosen, metric=metric, measure=measure, higher_is_better=higher)


def outputs_for(target: Tensor) -> int:
    """Numbers a model must put out for targets like ``target`` of a whole episode."""
    if target.is_floating_point():
        return target.shape[-1] if target.dim() > 1 else 1
    return LETTERS * target.shape[-1] if target.dim() > 1 else int(target.max()) + 1
