"""What can be read of the device that tasks are computed on."""

from __future__ import annotations

import functools

import torch


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
        found["utilisation"] = torch.cuda.utilization(device) / 100
    return found


@functools.cache
def _can_be_sampled(index: int | None) -> bool:
    try:
        torch.cuda.utilization(index)
    except Exception:  # the package is missing, or the driver refuses in one of many ways
        return False
    return True
