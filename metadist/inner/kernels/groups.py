"""Tasks as groups: what vmap asks of an operator that takes any number of groups already."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def members(t: Tensor, dim: int | None, n: int) -> Tensor:
    """``t`` with its vmapped dimension first, ``[n, ...]``; the same for each member where there is none.

    Args:
        t: what a vmap rule is given.
        dim: its vmapped dimension, or None.
        n: members.
    """
    return t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)


def with_weights(function: Any, n: int, in_dims: Any, pictures: Tensor, weight: Tensor, *how: Any) -> Tensor:
    """The vmap rule of a function of pictures and weights: a group for each member, one where they share the weights.

    Args:
        function: an autograd function of ``[G, B, ...]`` and ``[G or 1, ...]``.
        n: members.
        in_dims: vmapped dimensions.
        pictures, weight, how: what the rule is given.

    Returns:
        ``[n, G, B, ...]``
    """
    pictures = members(pictures, in_dims[0], n)
    if in_dims[1] is None and len(weight) == 1:
        # Shared by all: the members are so many more pictures of one group.
        made = function.apply(pictures.transpose(0, 1).flatten(1, 2), weight, *how)
        return made.unflatten(1, (n, -1)).transpose(0, 1)  # type: ignore[no-any-return]
    weight = members(weight, in_dims[1], n)
    if weight.shape[1] < pictures.shape[1]:
        weight = weight.expand(-1, pictures.shape[1], -1, -1, -1, -1)
    return function.apply(pictures.flatten(0, 1), weight.flatten(0, 1), *how).unflatten(0, (n, -1))  # type: ignore[no-any-return]


def of_pictures(function: Any, n: int, in_dims: Any, x: Tensor, y: Tensor, *how: Any) -> Tensor:
    """The vmap rule of a function of two sets of pictures, ``[G, B, ...]`` both: a group for each member."""
    x, y = (members(t, d, n).flatten(0, 1) for t, d in zip((x, y), in_dims[:2], strict=True))
    return function.apply(x, y, *how).unflatten(0, (n, -1))  # type: ignore[no-any-return]


def as_weights_are(weight: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of pictures ``[G, B, ...]`` as one group of all of them, where the groups share their weights."""
    if len(weight) == len(x):
        return x, y
    return x.reshape(1, -1, *x.shape[2:]), y.reshape(1, -1, *y.shape[2:])
