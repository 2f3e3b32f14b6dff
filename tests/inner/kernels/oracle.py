"""What a vectorised function must agree with: itself, or torch's own, a task at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def one_by_one(
    f: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], dims: Sequence[int | None]
) -> list[Tensor]:
    """``vmap(f, in_dims=dims)(*inputs)`` by a loop.

    Args:
        f: gives some tensors.
        inputs: with tasks in their first dimension, where their ``dims`` is 0; the same for all tasks where it is None.
        dims: 0 or None for each input.
    """
    tasks = next(len(t) for t, d in zip(inputs, dims, strict=True) if d == 0)
    alone = [f(*(t[i] if d == 0 else t for t, d in zip(inputs, dims, strict=True))) for i in range(tasks)]
    return [torch.stack(values) for values in zip(*alone, strict=True)]
