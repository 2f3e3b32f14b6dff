"""Functions of tensors as operators of torch: one node of a graph, whatever they do inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("metadist", "FRAGMENT")


class Operator:
    """``torch.ops.metadist.<name>``, without a derivative of its own.

    ``torch.library.custom_op`` makes the same, and looks after derivatives and changed arguments at each call, which
    takes 10 microseconds: a network of small layers calls a hundred operators for a microbatch of some milliseconds.

    Args:
        name: its name.
        function: computes it, changes no argument and returns none; its annotations are the operator's signature.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self.__doc__ = name, function.__doc__
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self._call = getattr(torch.ops.metadist, name).default

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def register_fake(self, shape: Callable[..., Any]) -> Callable[..., Any]:
        """Takes a function which makes an empty result of the right shape and type."""
        torch.library.register_fake(f"metadist::{self._name}", shape, lib=_LIBRARY)
        return shape


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes the decorated function an :class:`Operator`."""
    return lambda function: Operator(name, function)
