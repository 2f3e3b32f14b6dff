"""Tasks as groups: what vmap asks of an operator that takes any number of groups already."""

from __future__ import annotations

from torch import Tensor


def members(t: Tensor, dim: int | None, n: int) -> Tensor:
    """``t`` with its vmapped dimension first, ``[n, ...]``; the same for each member where there is none.

    Args:
        t: what a vmap rule is given.
        dim: its vmapped dimension, or None.
        n: members.
    """
    return t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)
