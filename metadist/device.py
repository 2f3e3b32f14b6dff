"""The device that tasks are computed on: which one, how it computes, and what can be read of it."""

from __future__ import annotations

import functools
import os
import time
from typing import Literal

import torch

from metadist.errors import ConfigError


def wants_gpu(gpus: float | Literal["auto"]) -> bool:
    """Whether workers are to compute on a GPU, as far as this machine can tell.

    Args:
        gpus: as of the config's ``runtime.gpus_per_worker``; ``auto`` takes a GPU if there is one here.
    """
    return torch.cuda.is_available() if gpus == "auto" else gpus > 0


def device_here(gpus: float | Literal["auto"]) -> str:
    """Where a process of this machine computes: ``cuda`` or ``cpu``.

    Args:
        gpus: as of :func:`wants_gpu`.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if not wants_gpu(gpus):
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError(
            "runtime.gpus_per_worker",
            f"is {gpus:g}, but PyTorch finds no GPU on this machine",
            "write auto or 0, or install PyTorch for this machine's GPU",
        )
    return "cuda"


def make_repeatable(device: torch.device, tf32: bool = False) -> None:
    """Makes this process compute on a GPU the same way each time it is given the same; nothing for a CPU.

    Algorithms are chosen by rule, not by timing them, and those are taken whose sums have one order. What has no such
    form warns when it is used. Products keep all bits of single precision unless ``tf32`` lets them be rounded to ten.
    """
    if device.type != "cuda":
        return
    # Read when the library is first used; its own choice may differ from stream to stream.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def wait_for(device: torch.device) -> None:
    """Returns when a GPU has done what it was told; at once for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gpu_state(device: torch.device) -> dict[str, float]:
    """How busy a GPU is, and how much of its memory this process has taken.

    Returns:
        ``memory_mb``, the most that was allocated so far, and ``utilisation``, the share in [0, 1] of the driver's
        last sampling period in which the GPU computed for anybody; the latter only where the package ``nvidia-ml-py``
        is installed. Nothing for a CPU.
    """
    if device.type != "cuda":
        return {}
    found = {"memory_mb": torch.cuda.max_memory_allocated(device) / 1e6}
    if _can_be_sampled(device.index):
        found["utilisation"] = _utilisation(device.index, int(time.monotonic()))
    return found


@functools.lru_cache(maxsize=64)
def _utilisation(index: int | None, second: int) -> float:
    """Asked of the driver once a second: its answer takes milliseconds, as long as a step of a small network."""
    return torch.cuda.utilization(index) / 100


@functools.cache
def _can_be_sampled(index: int | None) -> bool:
    try:
        torch.cuda.utilization(index)
    except Exception:  # the package is missing, or the driver refuses in one of many ways
        return False
    return True
