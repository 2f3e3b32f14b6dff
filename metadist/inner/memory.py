"""How much memory a computation takes, counted rather than measured, and before it is run if need be.

What is counted are the bytes of the tensors that are alive at once, as operators make them and drop them: a function
of the computation alone, so that a choice made by it is the same on every machine. Scratch space within operators and
what an allocator keeps for later are not in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes of tensors that ``call()`` held at once, of those it made; what it returns counts as well."""
    with _Tally() as tally:
        call()
    return tally.peak


def predicted_peak_bytes(call: Callable[..., Any], *arguments: Any) -> int:
    """What :func:`peak_bytes` would give for a second ``call(*arguments)``, without computing it or holding any of it.

    The first is where a compiled or traced function is made, which is no part of what runs from then on.

    Args:
        call: computes with shapes alone; must not look at values.
        arguments: trees of tensors, which stand for others of their shapes.

    Raises:
        RuntimeError, NotImplementedError, TypeError: what ``call`` does depends on values.
    """
    with _shapes_of(arguments) as shapes:
        call(*shapes)
        return peak_bytes(lambda: call(*shapes))


def draws_by_shapes(call: Callable[..., Any], *arguments: Any) -> bool:
    """Whether ``call(*arguments)`` draws random numbers, without computing it or holding any of it.

    Args, Raises: as of :func:`predicted_peak_bytes`.
    """
    with _shapes_of(arguments) as shapes, _Draws() as draws:
        call(*shapes)
    return draws.seen


@contextlib.contextmanager
def _shapes_of(arguments: Any) -> Iterator[Any]:
    """Within it, tensors are made with shapes but no values; the arguments as such tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        yield pytree.tree_map_only(Tensor, mode.from_tensor, arguments)


class _Draws(TorchDispatchMode):
    """Notes whether an operator draws random numbers."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class _Tally(TorchDispatchMode):
    """Counts the bytes of storages from the operator that makes them until nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in pytree.tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage(), given)
        return made

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._alive or key in given:  # a view of what is counted, or of what was there before
            return
        self._alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._dropped, key)

    def _dropped(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


LARGE = 1 << 27
"""Bytes of parameters from which copies of them are what fills a machine's memory."""


_MALLOPT = {-3: 1 << 25, -4: 1 << 16}  # blocks of 32 MB and more are mapped, at most 65536 at a time


def hand_back_what_is_freed() -> None:
    """Hands what this process has freed back to the system, and from now on large blocks as soon as they are freed.

    Workers and servers keep it (their environment says so), as pages of new blocks cost time. Of a large model that
    would be copies which nobody needs, and holes between them. Nothing happens where the allocator is not glibc's.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option, value in _MALLOPT.items():
            libc.mallopt(option, value)
    trim()


def trim() -> None:
    """Hands what this process has freed so far back to the system, where the allocator is glibc's."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_growth() -> Callable[[], int]:
    """From now on: by how many bytes the process's memory at its largest exceeded what it is now.

    On a GPU what tensors took there is added. Zero where the system does not tell.
    """
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the largest so far is now
    start = _resident("VmRSS")
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()

    def growth() -> int:
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
        return max(0, _resident("VmHWM") - start) + device

    return growth


def _resident(field: str) -> int:
    """Bytes that the process's status file has under a name (Linux)."""
    try:
        with open("/proc/self/status") as file:
            return next((1024 * int(line.split()[1]) for line in file if line.startswith(field + ":")), 0)
    except OSError:
        return 0
