"""The vectorised meta-gradient as one traced and compiled graph."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree


class CompiledFunction:
    """``fn`` traced down to single operators once for each set of shapes, then compiled by inductor.

    ``torch.compile`` alone cannot differentiate twice; the trace has the derivatives written out, so it
    need not. Tracing fixes every branch that ``fn`` takes, so ``fn`` must not branch on tensor values.

    Args:
        fn: a function of nested tensors that gives nested tensors, without side effects.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self._programs: dict[Any, tuple[Callable[..., Any], pytree.TreeSpec]] = {}

    def __call__(self, *args: Any) -> Any:
        flat, spec = pytree.tree_flatten(args)
        key = (spec, tuple((tuple(t.shape), t.dtype, t.device) for t in flat))
        if key not in self._programs:
            self._programs[key] = self._compile(flat, spec)
        program, out_spec = self._programs[key]
        with torch.no_grad():
            return pytree.tree_unflatten(program(*flat), out_spec)

    def _compile(self, flat: list[Tensor], spec: pytree.TreeSpec) -> tuple[Callable[..., Any], pytree.TreeSpec]:
        out_spec: list[pytree.TreeSpec] = []

        def traced(*tensors: Tensor) -> list[Tensor]:
            leaves, tree = pytree.tree_flatten(self.fn(*pytree.tree_unflatten(list(tensors), spec)))
            out_spec.append(tree)
            return leaves

        graph = make_fx(traced)(*flat)
        return torch.compile(graph, dynamic=False), out_spec[-1]


def compiler_missing() -> str:
    """Why code cannot be compiled on this machine; empty if it can."""
    if torch.cuda.is_available():
        return ""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        found = shutil.which(get_cpp_compiler())
    except Exception as e:
        return f"no C++ compiler was found ({type(e).__name__})"
    return "" if found else "no C++ compiler was found"
