"""A model in two parts: the body that makes features, and the last layer that reads them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metadist.episode import Episode
from metadist.inner import FunctionalModel


def find_head(module: nn.Module, name: str | None, example: Episode) -> str:
    """The name of a model's last layer.

    Args:
        module: the model.
        name: the layer's name; None takes the linear layer that was defined last.
        example: an episode, to see that the layer is the last thing that is computed.

    Raises:
        ValueError: there is no such layer, or the model goes on after it.
    """
    linear = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n]
    if name is None:
        if not linear:
            raise ValueError("the model has no linear layer below its top; name its last layer with `head`")
        name = linear[-1]
    if name not in dict(module.named_modules()):
        known = ", ".join(linear) or "none"
        raise ValueError(f"head: the model has no layer {name!r}; its linear layers are: {known}")
    model = FunctionalModel(module)
    model.cut_at(name)
    if model.random:
        return name
    params, x = model.initial_params(), example.support.x
    with torch.no_grad():
        whole = model(params, x)
        try:
            parts = model.classify(params, model.features(params, x))
        except RuntimeError:  # without the layer the rest does not fit together
            parts = None
    if parts is None or whole.shape != parts.shape or not torch.allclose(whole, parts, atol=1e-5, rtol=1e-4):
        raise ValueError(f"head: the model goes on after its layer {name!r}; name the one whose output is the model's")
    return name


def require_classes(learner: str, example: Episode) -> None:
    """Refuses targets that are not class numbers.

    Raises:
        ValueError: naming the learner that needs them.
    """
    y = example.support.y
    if y.is_floating_point() or y.dim() > 1:
        raise ValueError(f"{learner} tells classes apart: it needs whole-number targets, one an example")


def one_hot(y: Tensor, ways: int, like: Tensor) -> Tensor:
    """``[N, ways]`` of 0 and 1, in the dtype of ``like``, for class numbers ``y [N]``."""
    return (y[:, None] == torch.arange(ways, device=y.device)).to(like.dtype)


def class_means(features: Tensor, y: Tensor, ways: int) -> Tensor:
    """The mean feature of each class, ``[ways, D]``, of ``features [N, D]``; zero for a class without examples."""
    member = one_hot(y, ways, features)
    return member.T @ features / member.sum(0).clamp(min=1)[:, None]
