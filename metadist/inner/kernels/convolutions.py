"""Which convolutions are computed how."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metadist.inner.kernels import columns, taps, winograd

Convolution = Literal["direct", "columns", "winograd"]

POSITIONS = 256
"""Largest picture, in positions of the output, for which the memory of windows is no burden."""

FEW_NUMBERS = 32
"""Numbers in a window that are so few that their memory is none for larger pictures either."""

GPU_POSITIONS = 1024
"""The same on a GPU, where pictures larger than that keep its own convolutions busy enough."""

CHANNELS = 8
"""Fewest channels that fill the registers of :mod:`~metadist.inner.kernels.winograd` and ``taps``."""


class AsProducts(TorchFunctionMode):
    """Within it, convolutions are products of matrices where that pays; others stay as they are.

    Args:
        fast: take Winograd's form for what it can do (:mod:`metadist.inner.kernels.winograd`), and sums in registers
            (:mod:`metadist.inner.kernels.taps`) for the rest; otherwise, for few channels and on a GPU, windows
            (:mod:`metadist.inner.kernels.columns`).
    """

    def __init__(self, fast: bool = False) -> None:
        super().__init__()
        self._fast = fast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = self._convolved(*args, **(kwargs or {})) if func is torch.conv2d else None
        return func(*args, **(kwargs or {})) if made is None else made

    def _convolved(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Tensor | None:  # fmt: skip
        """The convolution as a product; None if it is of a kind that is left to torch."""
        stride, padding, dilation = (_pair(v) for v in (stride, padding, dilation))
        if groups != 1 or dilation != [1, 1] or padding is None or input.dim() != 4:
            return None
        outputs, channels, *kernel = weight.shape
        out = [columns.output_size(n, *of) for n, *of in zip(input.shape[2:], kernel, stride, padding, strict=True)]
        if min(out) < 1:
            return None
        if self._fast and not input.is_cuda and min(channels, outputs) >= CHANNELS:
            if winograd.takes(kernel, stride, padding):
                return winograd.convolution(input, weight, bias, padding)
            if taps.available(input.device, input.dtype):
                return taps.convolution(input, weight, bias, stride, padding)
        positions, few = out[0] * out[1], kernel[0] * kernel[1] * channels <= FEW_NUMBERS
        if positions <= GPU_POSITIONS if input.is_cuda else positions <= POSITIONS or few:
            return columns.convolution(input, weight, bias, stride, padding)
        return None


def _pair(value: Any) -> list[int] | None:
    """``[rows, columns]``; None for a word such as ``same``."""
    if isinstance(value, str):
        return None
    values = [value] if isinstance(value, int) else [int(v) for v in value]
    return values * 2 if len(values) == 1 else values
