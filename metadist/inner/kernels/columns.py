"""Convolution as a product of matrices, for many small pictures with weights of their own for each task.

The adapted weights of a task differ from its neighbours', so that a convolution over a microbatch of
tasks becomes a grouped one, which libraries do badly on a CPU. Written as rows of windows times a matrix of
weights it becomes one batched product, which they do well. Taking the windows (:func:`windows`) and summing
rows back into pictures (:func:`sum_windows`) are linear and each other's transpose, so derivatives of any order
consist of the two and of products.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.inner.kernels.build import function
from metadist.inner.kernels.operator import operator

_SOURCE = Path(__file__).with_name("columns.cpp")


class _Shape(ctypes.Structure):
    """As in columns.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in (
        "batch", "height", "width", "channels", "kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w",
        "out_h", "out_w",
    )]  # fmt: skip


def output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


@operator("windows")
def _windows(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """Every window of the kernel as a row, ``[B, H', W', kernel_h * kernel_w * C]``, of ``x [B, H, W, C]``."""
    x = x.contiguous()
    rows = _windows_shape(x, kernel, stride, padding)
    if (compiled := _compiled("windows", x.device, x.dtype)) is None:
        return _plain_windows(x, kernel, stride, padding, rows.shape[1:3])
    compiled(x.data_ptr(), rows.data_ptr(), _Shape(*x.shape, *kernel, *stride, *padding, *rows.shape[1:3]))
    return rows


@_windows.register_fake
def _windows_shape(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    b, h, w, c = x.shape
    out = (output_size(n, *of) for n, *of in zip((h, w), kernel, stride, padding, strict=True))
    return x.new_empty(b, *out, kernel[0] * kernel[1] * c)


@operator("sum_windows")
def _sum_windows(rows: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """The transpose of :func:`_windows`: rows added where they came from, ``[B, *size, C]``."""
    rows = rows.contiguous()
    x = _sum_windows_shape(rows, size, kernel, stride, padding)
    if (compiled := _compiled("sum_windows", rows.device, rows.dtype)) is None:
        return _plain_sum_windows(rows, x.shape, kernel, stride, padding)
    compiled(rows.data_ptr(), x.data_ptr(), _Shape(*x.shape, *kernel, *stride, *padding, *rows.shape[1:3]))
    return x


@_sum_windows.register_fake
def _sum_windows_shape(
    rows: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    return rows.new_empty(rows.shape[0], *size, rows.shape[3] // (kernel[0] * kernel[1]))


def _compiled(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The C++ function, or None where the tensor operations do as well."""
    return function(_SOURCE, name, device, dtype, (ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(_Shape)))


def _plain_windows(x: Tensor, kernel: list[int], stride: list[int], padding: list[int], out: torch.Size) -> Tensor:
    x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    return torch.cat([x[_reach(u, v, out, stride)] for u in range(kernel[0]) for v in range(kernel[1])], -1)


def _plain_sum_windows(
    rows: Tensor, shape: torch.Size, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    b, h, w, c = shape
    x = rows.new_zeros(b, h + 2 * padding[0], w + 2 * padding[1], c)
    parts = rows.split(c, -1)
    # Backwards, so that each position receives its parts in the order of the windows, as in C++: the bits are equal.
    for u in reversed(range(kernel[0])):
        for v in reversed(range(kernel[1])):
            x[_reach(u, v, rows.shape[1:3], stride)] += parts[u * kernel[1] + v]
    return x[:, padding[0] : padding[0] + h, padding[1] : padding[1] + w].contiguous()


def _reach(u: int, v: int, out: torch.Size, stride: list[int]) -> tuple[slice, ...]:
    """Where the window's element (u, v) lies in padded pictures, over all windows."""
    rows, columns = (slice(at, at + step * (n - 1) + 1, step) for at, n, step in zip((u, v), out, stride, strict=True))
    return slice(None), rows, columns


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, kernel: Any, stride: Any, padding: Any) -> Tensor:
        return _windows(x, kernel, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, *ctx.how = inputs
        ctx.size = list(x.shape[1:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _SumWindows.apply(grad, ctx.size, *ctx.how), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *how: Any) -> Any:
        return _folded(_Windows, x.movedim(in_dims[0], 0), *how), 0


class _SumWindows(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, size: Any, kernel: Any, stride: Any, padding: Any) -> Tensor:
        return _sum_windows(rows, size, kernel, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, *ctx.how = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Windows.apply(grad, *ctx.how), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, rows: Tensor, *how: Any) -> Any:
        return _folded(_SumWindows, rows.movedim(in_dims[0], 0), *how), 0


def _folded(function: Any, values: Tensor, *how: Any) -> Tensor:
    """``function`` over two leading dimensions as if they were one."""
    made = function.apply(values.reshape(-1, *values.shape[2:]), *how)
    return made.reshape(*values.shape[:2], *made.shape[1:])


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
    """``F.conv2d`` of ``x [N, C, H, W]`` with ``weight [O, C, kernel_h, kernel_w]``, as a product of matrices."""
    outputs, channels, *kernel = weight.shape
    rows = _Windows.apply(x.permute(0, 2, 3, 1), kernel, stride, padding)
    n, h, w, numbers = rows.shape
    out = rows.reshape(n * h * w, numbers) @ weight.permute(2, 3, 1, 0).reshape(numbers, outputs)
    out = out if bias is None else out + bias
    pictures = out.reshape(n, h, w, outputs).permute(0, 3, 1, 2)
    # On a GPU, pooling would ask for pictures channel by channel in memory by a name that vmap does not know.
    return pictures.contiguous() if x.is_cuda else pictures
