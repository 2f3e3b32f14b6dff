"""Passes over long vectors at the speed of the memory: sums along a tree, means with their norms."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from metadist.inner.kernels.build import function

ADD = -1
_SOURCE = Path(__file__).with_name("vectors.cpp")
_SUM = (
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int32), ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
)  # fmt: skip
_MEAN = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p)
_LANES = 16
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
    summed = function(_SOURCE, "tree_sum", torch.device("cpu"), made, _SUM) if made else None
    if summed is None or not all(v.dtype == dtype and v.flags.c_contiguous for v in values):
        return _plainly(program, values)
    out = np.empty(n, dtype)
    steps = (ctypes.c_int32 * len(program))(*program)
    places = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
    summed(places, steps, len(program), out.ctypes.data, n)
    return out


def mean_and_squares(vector: np.ndarray, tasks: float, bounds: np.ndarray) -> list[float]:
    """Divides a vector by ``tasks``, in place; the sums of squares of its chunks as they are then, in float64.

    Squares are added in sixteen lanes, and these in their order: the same bits with or without a compiler.

    Args:
        vector: ``[n]``, contiguous; changed.
        tasks: what to divide by, in the vector's own precision.
        bounds: where the chunks begin, and at the end ``n``, int64 ``[chunks + 1]``; they leave nothing out.
    """
    made = _DTYPES.get(vector.dtype)
    mean = function(_SOURCE, "mean_and_squares", torch.device("cpu"), made, _MEAN) if made else None
    if mean is not None and vector.flags.c_contiguous:
        squares = np.empty(len(bounds) - 1)
        mean(vector.ctypes.data, bounds.ctypes.data, len(squares), tasks, squares.ctypes.data)
        return squares.tolist()
    return [_mean_plainly(vector[a:z], tasks) for a, z in pairwise(bounds.tolist())]


def _mean_plainly(vector: np.ndarray, tasks: float) -> float:
    with np.errstate(all="ignore"):
        np.divide(vector, vector.dtype.type(tasks), out=vector)
        wide = vector.astype(np.float64)
        whole = len(wide) // _LANES * _LANES
        lanes = np.add.reduce(np.square(wide[:whole]).reshape(-1, _LANES), axis=0)
        lanes[: len(wide) - whole] += np.square(wide[whole:])
        total = 0.0
        for lane in lanes.tolist():
            total += lane
        return total


def _plainly(program: Sequence[int], values: Sequence[np.ndarray]) -> np.ndarray:
    stack: list[np.ndarray] = []
    for step in program:
        if step == ADD:
            right, left = stack.pop(), stack.pop()
            stack.append(left + right)
        else:
            stack.append(values[step])
    return stack.pop()
