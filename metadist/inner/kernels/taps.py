"""Convolutions of any kernel and stride for many tasks, without windows in memory.

The adapted weights of a task differ from its neighbours', and libraries do such grouped convolutions badly on a CPU.
:mod:`~metadist.inner.kernels.columns` makes one batched product of them, at the price of writing every window, nine
times the picture, and of summing such rows back. The C++ here holds sums of products in registers and reads the
pictures themselves. Three operators suffice for derivatives of any order, as each is linear in both of its arguments
and their transposes are again of the three kinds: :func:`convolve` (pictures and weights to outputs), :func:`spread`
(outputs and weights to pictures) and :func:`correlate` (pictures and outputs to weights). All take *groups*: pictures
that share weights, which the groups need not share with each other.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from metadist.inner.kernels.build import function
from metadist.inner.kernels.columns import output_size
from metadist.inner.kernels.groups import as_weights_are, of_pictures, with_weights
from metadist.inner.kernels.operator import operator

_SOURCE = Path(__file__).with_name("taps.cpp")


class _Shape(ctypes.Structure):
    """As in taps.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in (
        "groups", "weight_groups", "batch", "height", "width", "inputs", "outputs", "kernel_h", "kernel_w", "stride_h",
        "stride_w", "pad_h", "pad_w", "out_h", "out_w",
    )]  # fmt: skip


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the C++ can be had for such tensors; without it, :mod:`~metadist.inner.kernels.columns` is faster."""
    return _compiled("convolve", device, dtype) is not None


def _compiled(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    arguments = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(_Shape))
    return function(_SOURCE, name, device, dtype, arguments)


def _call(name: str, x: Tensor, weight: Tensor, y: Tensor, stride: list[int], padding: list[int], order: str) -> bool:
    """Computes the one of the three that is last in ``order`` (``xwy``); False where there is no C++ for it."""
    if (compiled := _compiled(name, x.device, x.dtype)) is None:
        return False
    groups, batch, height, width, inputs = x.shape
    shape = _Shape(
        groups, len(weight), batch, height, width, inputs, y.shape[-1], *weight.shape[1:3], *stride, *padding,
        *y.shape[2:4],
    )  # fmt: skip
    tensors = {"x": x, "w": weight, "y": y}
    compiled(*(tensors[letter].data_ptr() for letter in order), shape)
    return True


@operator("tap_convolve")
def convolve(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """Every group's pictures convolved with its weights.

    Args:
        x: ``[G, B, H, W, C]``.
        weight: ``[G, kernel_h, kernel_w, C, O]``, or ``[1, ...]`` for all groups.
        stride, padding: of rows and of columns.

    Returns:
        ``[G, B, H', W', O]``
    """
    x, weight = x.contiguous(), weight.contiguous()
    y = _convolve_shape(x, weight, stride, padding)
    if _call("convolve", x, weight, y, stride, padding, "xwy"):
        return y
    return _each(lambda p, w: F.conv2d(p, w, None, stride, padding), _first(x), _weights(weight, len(x)))


@convolve.register_fake
def _convolve_shape(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    of = zip(x.shape[2:4], weight.shape[1:3], stride, padding, strict=True)
    return x.new_empty(*x.shape[:2], *(output_size(*one) for one in of), weight.shape[-1])


@operator("tap_spread")
def spread(y: Tensor, weight: Tensor, size: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """The slope of ``(convolve(x, weight) * y).sum()`` in the pictures.

    Args:
        y: ``[G, B, H', W', O]``.
        weight: ``[G, kernel_h, kernel_w, C, O]``, or ``[1, ...]`` for all groups.
        size: ``H`` and ``W`` of the pictures.
        stride, padding: as of :func:`convolve`.

    Returns:
        ``[G, B, H, W, C]``
    """
    y, weight = y.contiguous(), weight.contiguous()
    x = _spread_shape(y, weight, size, stride, padding)
    if _call("spread", x, weight, y, stride, padding, "ywx"):
        return x
    shape = [x.shape[1], x.shape[-1], *size]
    return _each(lambda q, w: conv2d_input(shape, w, q, stride, padding), _first(y), _weights(weight, len(y)))


@spread.register_fake
def _spread_shape(y: Tensor, weight: Tensor, size: list[int], stride: list[int], padding: list[int]) -> Tensor:
    return y.new_empty(*y.shape[:2], *size, weight.shape[3])


@operator("tap_correlate")
def correlate(x: Tensor, y: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """The slope of ``(convolve(x, weight) * y).sum()`` in the weights.

    Args:
        x: ``[G, B, H, W, C]``.
        y: ``[G, B, H', W', O]``.
        kernel: rows and columns of the weights.
        stride, padding: as of :func:`convolve`.

    Returns:
        ``[G, kernel_h, kernel_w, C, O]``
    """
    x, y = x.contiguous(), y.contiguous()
    weight = _correlate_shape(x, y, kernel, stride, padding)
    if _call("correlate", x, weight, y, stride, padding, "xyw"):
        return weight
    shape = [y.shape[-1], x.shape[-1], *kernel]
    made = [conv2d_weight(p, shape, q, stride, padding) for p, q in zip(_first(x), _first(y), strict=True)]
    return torch.stack(made).permute(0, 3, 4, 2, 1).contiguous()


@correlate.register_fake
def _correlate_shape(x: Tensor, y: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    return x.new_empty(len(x), *kernel, x.shape[-1], y.shape[-1])


def _first(pictures: Tensor) -> Tensor:
    """Channels first, as torch has them."""
    return pictures.permute(0, 1, 4, 2, 3)


def _weights(weight: Tensor, groups: int) -> Tensor:
    return weight.permute(0, 4, 3, 1, 2).expand(groups, -1, -1, -1, -1)


def _each(convolution: Any, pictures: Tensor, weights: Tensor) -> Tensor:
    made = [convolution(p, w).permute(0, 2, 3, 1) for p, w in zip(pictures, weights, strict=True)]
    return torch.stack(made).contiguous()


class _OfTwo(torch.autograd.Function):
    """A function of two tensors whose last arguments are stride and padding."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.how = inputs[-2:]


class _Convolve(_OfTwo):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: Any, padding: Any) -> Tensor:
        return convolve(x.contiguous(), weight.contiguous(), stride, padding)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        g_x = _Spread.apply(slope, weight, list(x.shape[2:4]), *ctx.how) if ctx.needs_input_grad[0] else None
        g_w = _slope_of_weight(x, slope, weight, ctx.how) if ctx.needs_input_grad[1] else None
        return g_x, g_w, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, *how: Any) -> Any:
        return with_weights(_Convolve, info.batch_size, in_dims, x, weight, *how), 0


class _Spread(_OfTwo):
    @staticmethod
    def forward(y: Tensor, weight: Tensor, size: Any, stride: Any, padding: Any) -> Tensor:
        return spread(y.contiguous(), weight.contiguous(), size, stride, padding)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        y, weight = ctx.saved_tensors
        g_y = _Convolve.apply(slope, weight, *ctx.how) if ctx.needs_input_grad[0] else None
        g_w = _slope_of_weight(slope, y, weight, ctx.how) if ctx.needs_input_grad[1] else None
        return g_y, g_w, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, y: Tensor, weight: Tensor, *how: Any) -> Any:
        return with_weights(_Spread, info.batch_size, in_dims, y, weight, *how), 0


class _Correlate(_OfTwo):
    @staticmethod
    def forward(x: Tensor, y: Tensor, kernel: Any, stride: Any, padding: Any) -> Tensor:
        return correlate(x.contiguous(), y.contiguous(), kernel, stride, padding)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        x, y = ctx.saved_tensors
        g_x = _Spread.apply(y, slope, list(x.shape[2:4]), *ctx.how) if ctx.needs_input_grad[0] else None
        g_y = _Convolve.apply(x, slope, *ctx.how) if ctx.needs_input_grad[1] else None
        return g_x, g_y, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, y: Tensor, *how: Any) -> Any:
        return of_pictures(_Correlate, info.batch_size, in_dims, x, y, *how), 0


def _slope_of_weight(x: Tensor, y: Tensor, weight: Tensor, how: Any) -> Tensor:
    return _Correlate.apply(*as_weights_are(weight, x, y), list(weight.shape[1:3]), *how)  # type: ignore[no-any-return]


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
    """``F.conv2d`` of ``x [N, C, H, W]`` with ``weight [O, C, kernel_h, kernel_w]``."""
    y = _Convolve.apply(x.permute(0, 2, 3, 1)[None], weight.permute(2, 3, 1, 0)[None], stride, padding)[0]
    y = y if bias is None else y + bias
    return y.permute(0, 3, 1, 2)
