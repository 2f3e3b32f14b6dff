"""Sums of long vectors along a tree, at the speed of the memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from metadist.inner.kernels.build import function

ADD = -1
_SOURCE = Path(__file__).with_name("tree.cpp")
_ARGUMENTS = (
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int32), ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
)  # fmt: skip
_DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}


def tree_sum(program: Sequence[int], values: Sequence[np.ndarray]) -> np.ndarray:
    """The sum that ``program`` says, of vectors that are only read; a new vector, or the one there is.

    Args:
        program: a binary tree in postfix: ``k`` is ``values[k]``, :data:`ADD` the sum of the two before it.
        values: vectors ``[n]`` of one dtype.
    """
    if len(program) == 1:
        return values[program[0]]
    dtype, n = values[0].dtype, len(values[0])
    made = _DTYPES.get(dtype)
    summed = function(_SOURCE, "tree_sum", torch.device("cpu"), made, _ARGUMENTS) if made else None
    if summed is None or not all(v.dtype == dtype and v.flags.c_contiguous for v in values):
        return _plainly(program, values)
    out = np.empty(n, dtype)
    steps = (ctypes.c_int32 * len(program))(*program)
    places = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
    summed(places, steps, len(program), out.ctypes.data, n)
    return out


def _plainly(program: Sequence[int], values: Sequence[np.ndarray]) -> np.ndarray:
    stack: list[np.ndarray] = []
    for step in program:
        if step == ADD:
            right, left = stack.pop(), stack.pop()
            stack.append(left + right)
        else:
            stack.append(values[step])
    return stack.pop()
