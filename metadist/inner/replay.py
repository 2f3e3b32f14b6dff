"""A program of many small operators as one launch: recorded once as a CUDA graph, then replayed.

A meta-gradient of small networks is hundreds of kernels of a few microseconds each, which a processor launches slower
than a GPU runs them. Replayed, they follow one another without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from metadist.errors import first_line

log = logging.getLogger(__name__)

_WARM_UP = 2
"""Calls before the recording, in which libraries choose their algorithms and take their workspaces."""

_first: dict[torch.device, torch.cuda.CUDAGraph] = {}
"""An empty recording for each device. Its memory is that of all others of the device, which run one after another and
whose results are copied before the next runs; as it stays, so does what they share when one of them is dropped."""


def replayed(program: Callable[..., list[Tensor]], inputs: list[Tensor]) -> Callable[..., list[Tensor]]:
    """``program`` as a CUDA graph where its inputs lie on a GPU and it can be recorded; else as it is.

    Args:
        program: takes tensors of the shapes of ``inputs`` and gives tensors; the same kernels at each call.
        inputs: an example.
    """
    devices = {t.device for t in inputs}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return program
    try:
        return _Replayed(program, inputs)
    except RuntimeError as e:
        # Something in it waits for the processor, say. It runs all the same, launch by launch.
        log.warning("the meta-gradient cannot be recorded as a CUDA graph and is launched anew each time: %s",
                    first_line(e))  # fmt: skip
        torch.cuda.synchronize()
        _record_nothing()
        return program


def _record_nothing() -> torch.cuda.CUDAGraph:
    """A recording of next to nothing; a failed one leaves the random numbers in its hands until another one ends."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
    return graph


class _Replayed:
    """The recording."""

    def __init__(self, program: Callable[..., list[Tensor]], inputs: list[Tensor]) -> None:
        device = inputs[0].device
        self._inputs = [t.clone() for t in inputs]
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                program(*self._inputs)
        torch.cuda.current_stream(device).wait_stream(aside)
        if device not in _first:
            _first[device] = _record_nothing()
        self._graph = torch.cuda.CUDAGraph()
        # Of this thread alone: another one may be moving the next episodes at the same time.
        with torch.cuda.graph(self._graph, pool=_first[device].pool(), capture_error_mode="thread_local"):
            self._outputs = list(program(*self._inputs))

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        torch._foreach_copy_(self._inputs, list(inputs))
        self._graph.replay()
        return [t.clone() for t in self._outputs]
