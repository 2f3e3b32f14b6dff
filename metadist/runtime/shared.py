"""Arrays in memory that the processes of one node share: written once where they are made, read where they lie.

What goes from process to process is where an array lies, a message of some hundred bytes. The memory belongs to no
file: it ends with the last process that has opened it, however that ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ray.exceptions import RayError

from metadist.outer.vectors import copy_into

_HEAD = 4096
"""Bytes before the first array, so that it begins a page: the area's tag."""
_ALIGNED = 64


class SharedMemoryLost(RayError):
    """An array's memory cannot be opened: the process that made it has ended."""


class Area(NamedTuple):
    """Memory that a process shares: its number, the area's descriptor there, and a tag that nobody else has."""

    pid: int
    descriptor: int
    tag: bytes


class Shared(NamedTuple):
    """Arrays in an area: their dtype, and of each where it begins, in bytes, and how many numbers it has."""

    area: Area
    dtype: str
    places: dict[Any, tuple[int, int]]


def can_share() -> bool:
    """Whether this system has memory without a file, and ways for others to open it."""
    return hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


class Writer:
    """Areas of this process. Each holds what was written last until it is let go of; none is ever closed or moved.

    So there are as many as were held at once, each as large as the most that it held.
    """

    def __init__(self) -> None:
        self._areas: dict[Area, tuple[int, mmap.mmap]] = {}
        self._free: list[Area] = []
        self._given: list[Area] = []

    def room(self, count: int, dtype: np.dtype[Any]) -> np.ndarray:
        """A vector ``[count]`` in an area that is free, for what is then given to :meth:`write`: it lies there already.

        It may be used until :meth:`write` or :meth:`let_go` is called, and after the first if it was given to it.
        """
        area, memory = self._room(_HEAD + _padded(count * np.dtype(dtype).itemsize))
        self._given.append(area)
        return np.frombuffer(memory, dtype, count, _HEAD)

    def write(self, parts: Sequence[Mapping[Any, np.ndarray]]) -> list[Shared]:
        """Puts named arrays, of one dtype, into one area; where they lie, part by part.

        They are copied, unless all of them lie in one that :meth:`room` gave.
        """
        written = self._lie_there(parts) or self._copied(parts)
        self._given = [area for area in self._given if area != written[0].area]
        self._take_back()
        return written

    def _lie_there(self, parts: Sequence[Mapping[Any, np.ndarray]]) -> list[Shared] | None:
        arrays = [array for part in parts for array in part.values()]
        for area in self._given:
            size, memory = self._areas[area]
            start = np.frombuffer(memory, np.uint8).ctypes.data
            if all(a.flags.c_contiguous and 0 <= a.ctypes.data - start <= size - a.nbytes for a in arrays):
                at = [{name: (a.ctypes.data - start, a.size) for name, a in part.items()} for part in parts]
                return [Shared(area, arrays[0].dtype.str, places) for places in at]
        return None

    def _copied(self, parts: Sequence[Mapping[Any, np.ndarray]]) -> list[Shared]:
        arrays = [array for part in parts for array in part.values()]
        dtype = np.dtype(arrays[0].dtype)
        area, memory = self._room(_HEAD + sum(_padded(array.nbytes) for array in arrays))
        at, written = _HEAD, []
        for part in parts:
            places: dict[Any, tuple[int, int]] = {}
            for name, array in part.items():
                copy_into(np.frombuffer(memory, dtype, array.size, at), array.reshape(-1))
                places[name] = at, array.size
                at += _padded(array.nbytes)
            written.append(Shared(area, dtype.str, places))
        return written

    def memory(self, shared: Shared) -> dict[Any, np.ndarray]:
        """The arrays themselves, to be changed in place: whoever has opened the area sees what is written there."""
        (_, memory), dtype = self._areas[shared.area], np.dtype(shared.dtype)
        return {name: np.frombuffer(memory, dtype, count, at) for name, (at, count) in shared.places.items()}

    def let_go(self, areas: Iterable[Area]) -> None:
        """Nobody will read what is in these areas any more, nor write to what :meth:`room` gave."""
        self._take_back()
        self._free += [area for area in dict.fromkeys(areas) if area in self._areas and area not in self._free]

    def _take_back(self) -> None:
        self._free += self._given
        self._given = []

    def _room(self, size: int) -> tuple[Area, mmap.mmap]:
        """The smallest free area that is large enough, or a larger one in the place of the largest, or a new one."""
        fitting = sorted(self._free, key=lambda area: (self._areas[area][0] < size, abs(self._areas[area][0] - size)))
        if fitting:
            area = fitting[0]
            self._free.remove(area)
            held, memory = self._areas[area]
            if held < size:
                os.ftruncate(area.descriptor, size)
                memory = mmap.mmap(area.descriptor, size)
                self._areas[area] = size, memory
            return area, memory
        descriptor = os.memfd_create("metadist")
        try:
            os.ftruncate(descriptor, size)
            memory = mmap.mmap(descriptor, size)
        except OSError:
            os.close(descriptor)
            raise
        area = Area(os.getpid(), descriptor, secrets.token_bytes(16))
        memory[: len(area.tag)] = area.tag
        self._areas[area] = size, memory
        return area, memory


class Reader:
    """Opens areas of other processes of this node, and keeps them open until it is told to forget."""

    def __init__(self) -> None:
        self._open: dict[Area, tuple[int, mmap.mmap]] = {}

    def read(self, shared: Shared) -> dict[Any, np.ndarray]:
        """The arrays, each flat; they cannot be written to.

        Raises:
            SharedMemoryLost: the area is not open, and cannot be opened any more.
        """
        dtype = np.dtype(shared.dtype)
        size = max((at + count * dtype.itemsize for at, count in shared.places.values()), default=_HEAD)
        memory = self._memory(shared.area, size)
        return {name: np.frombuffer(memory, dtype, count, at) for name, (at, count) in shared.places.items()}

    def forget(self, pids: Collection[int]) -> None:
        """Closes the areas of processes that have ended; arrays that were read from them stay."""
        self._close([area for area in self._open if area.pid in pids])

    def keep(self, pids: Collection[int]) -> None:
        """Closes the areas of all other processes."""
        self._close([area for area in self._open if area.pid not in pids])

    def _close(self, areas: Iterable[Area]) -> None:
        for area in areas:
            descriptor, _ = self._open.pop(area)
            os.close(descriptor)

    def _memory(self, area: Area, size: int) -> mmap.mmap:
        descriptor, memory = self._open.get(area, (-1, None))
        if memory is not None and len(memory) >= size:
            return memory
        try:
            if memory is None:
                descriptor = os.open(_path(area), os.O_RDONLY)
            # It may have grown since it was opened.
            memory = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
            if memory[: len(area.tag)] != area.tag or len(memory) < size:
                raise OSError("it is another's by now")
        except (OSError, ValueError) as e:
            self._open.pop(area, None)
            if descriptor >= 0:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            raise SharedMemoryLost(f"the memory of process {area.pid} cannot be opened: {e}") from e
        self._open[area] = descriptor, memory
        return memory


def _path(area: Area) -> str:
    return f"/proc/{area.pid}/fd/{area.descriptor}"


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
