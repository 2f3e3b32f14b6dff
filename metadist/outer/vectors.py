"""Passes over long vectors at the speed of the memory: sums along a tree, means with their norms."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metadist.inner.kernels.build import function, load

Room = Callable[[int, Any], np.ndarray]
"""Gives a vector that is to be written to, for how many numbers it has and their dtype: ``numpy.empty``, for one."""

ADD = -1
_SOURCE = Path(__file__).with_name("vectors.cpp")
_SUM = (
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int32), ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
)  # fmt: skip
_MEAN = (
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int32), ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
    ctypes.c_double, ctypes.c_void_p, ctypes.c_void_p,
)  # fmt: skip
_LANES = 16
_PAST_CACHE = 1 << 23
"""Bytes of a vector that would push itself out of the cache."""
_WORTH_THREADS = 1 << 22
"""Bytes of a vector from which it is worth starting threads."""
_DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}


@dataclass(frozen=True)
class Addends:
    """Vectors that are to be added up, along a tree; they are only read.

    Args:
        program: the binary tree in postfix: ``k`` is ``values[k]``, :data:`ADD` the sum of the two before it.
        values: vectors ``[n]`` of one dtype, at least one.
    """

    program: Sequence[int]
    values: Sequence[np.ndarray]

    def sum(self, room: Room = np.empty) -> np.ndarray:
        """The sum ``[n]``: a new vector, in memory that ``room`` gives, or the one there is."""
        if len(self.program) == 1:
            return self.values[self.program[0]]
        out = room(len(self.values[0]), self.values[0].dtype)
        summed = self._compiled("tree_sum", _SUM)
        if summed is None:
            out[:] = _plainly(self.program, self.values)
        else:
            summed(*self._tree(), out.ctypes.data, len(out))
        return out

    def part(self, start: int, stop: int) -> np.ndarray:
        """The sum of a part, as of :meth:`sum`."""
        return Addends(self.program, [v[start:stop] for v in self.values]).sum()

    def cast(self, dtype: np.dtype) -> Addends:
        """The same sum in another precision."""
        return self if self.values[0].dtype == dtype else Addends([0], [self.sum().astype(dtype)])

    def mean_and_squares(self, tasks: float, bounds: np.ndarray, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The sum divided by ``tasks``, a new vector ``[n]``, and the sums of squares of its chunks in float64.

        Squares are added in sixteen lanes, and these in their order: the same bits with or without a compiler, and with
        any number of threads.

        Args:
            tasks: what to divide by, in the vectors' own precision.
            bounds: where the chunks begin, and at the end ``n``, int64 ``[chunks + 1]``; they leave nothing out.
            threads: among which the chunks are shared out, if there is much to do.
        """
        squares = np.empty(len(bounds) - 1)
        mean = self._compiled("tree_mean", _MEAN)
        if mean is None:
            out = self.sum().copy()
            for i, (a, z) in enumerate(pairwise(bounds.tolist())):
                squares[i] = _mean_plainly(out[a:z], tasks)
            return out, squares
        out = np.empty(len(self.values[0]), self.values[0].dtype)
        tree = self._tree()

        def work(first: int, last: int) -> None:
            where = bounds[first:].ctypes.data, last - first
            mean(*tree, *where, tasks, out.ctypes.data, squares[first:].ctypes.data)

        _shared_out(work, len(squares), threads if out.nbytes >= _WORTH_THREADS else 1)
        return out, squares

    def _compiled(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """The C++ function, None where it cannot take these."""
        dtype = self.values[0].dtype
        made = _DTYPES.get(dtype)
        if made is None or not all(v.dtype == dtype and v.flags.c_contiguous for v in self.values):
            return None
        return function(_SOURCE, name, torch.device("cpu"), made, arguments)

    def _tree(self) -> tuple[Any, Any, int]:
        steps = (ctypes.c_int32 * len(self.program))(*self.program)
        places = (ctypes.c_void_p * len(self.values))(*(v.ctypes.data for v in self.values))
        return places, steps, len(self.program)


def copy_into(place: np.ndarray, values: np.ndarray) -> None:
    """Copies a vector for others to read, past the cache of this processor if it is a long one.

    Args:
        place: ``[n]``, contiguous.
        values: ``[n]`` of the same dtype.
    """
    library = load(_SOURCE) if values.nbytes >= _PAST_CACHE and values.flags.c_contiguous else None
    if library is None:
        place[:] = values
    else:
        library.copy(*(ctypes.c_void_p(v.ctypes.data) for v in (values, place)), ctypes.c_int64(values.nbytes))


def all_finite(values: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite, in one pass, without memory in which to note it number by number.

    Args:
        values: of any shape, floating point.
    """
    return not values.numel() or all(math.isfinite(end) for end in torch.aminmax(values))


def _shared_out(work: Callable[[int, int], None], count: int, threads: int) -> None:
    """Calls ``work(first, last)`` for parts of ``range(count)``, in as many threads."""
    ends = [count * i // threads for i in range(threads + 1)]
    if threads == 1:
        work(0, count)
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work, first, last) for first, last in pairwise(ends[1:])]
        work(ends[0], ends[1])
        for other in others:
            other.result()


def _mean_plainly(vector: np.ndarray, tasks: float) -> float:
    """Divides a vector by ``tasks``, in place; its sum of squares."""
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
