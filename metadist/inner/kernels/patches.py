"""A network's first block, from pictures with few channels to what its pooling leaves, as one operator.

The first convolution computes little and writes the most: 64 maps of the picture's own size, which BatchNorm, ReLU and
pooling then read and write several times over. But BatchNorm's statistics follow from the *moments of the windows*:
with ``m`` and ``S`` the mean and covariance of all windows of a set, a filter ``w`` has mean ``w m`` and variance ``w
S w``. Normalising is then part of the filters, ``u = a . window + c`` with ``a`` and ``c`` functions of the weights,
and the whole block is :func:`pick`: of each cell the largest ``u``, if it is positive. Computing ``u`` again is
cheaper than keeping it, so nothing of its size is ever written. :func:`pick` and its transpose :func:`push` are linear
in what is picked, and give each other's derivatives, to any order; everything else is algebra on a filter's few
numbers.

The pictures are data: there is no derivative in them, and a caller whose pictures depend on what is learned must take
another way (:func:`tracked`). Only where the C++ is built (:func:`available`), on the CPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metadist.inner.kernels.build import function
from metadist.inner.kernels.columns import output_size
from metadist.inner.kernels.groups import members
from metadist.inner.kernels.operator import operator

_SOURCE = Path(__file__).with_name("patches.cpp")

FEW_NUMBERS = 32
"""Most numbers of a window for which computing its outputs again is cheaper than keeping them."""


@dataclass(frozen=True)
class Windows:
    """The windows of a convolution, and the pooling after it.

    Args:
        kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w: of the convolution.
        pool: 2 for 2x2 max pooling, 1 for none.
    """

    kernel_h: int
    kernel_w: int
    stride_h: int = 1
    stride_w: int = 1
    pad_h: int = 0
    pad_w: int = 0
    pool: int = 1

    def outputs(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of windows on a picture."""
        return (
            output_size(height, self.kernel_h, self.stride_h, self.pad_h),
            output_size(width, self.kernel_w, self.stride_w, self.pad_w),
        )


class _Shape(ctypes.Structure):
    """As in patches.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in (
        "groups", "batch", "height", "width", "channels", "kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h",
        "pad_w", "out_h", "out_w", "outputs",
    )]  # fmt: skip


def _compiled(name: str, device: torch.device, dtype: torch.dtype, tensors: int, pooled: bool) -> Any:
    rest = (ctypes.POINTER(_Shape), ctypes.c_int64) if pooled else (ctypes.POINTER(_Shape),)
    return function(_SOURCE, name, device, dtype, (ctypes.c_void_p,) * tensors + rest)


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the operators can be had for such tensors."""
    return _compiled("pick", device, dtype, 6, True) is not None


def _call(name: str, x: Tensor, how: list[int], outputs: int, *tensors: Tensor | None, pooled: bool = True) -> None:
    compiled = _compiled(name, x.device, x.dtype, len(tensors), pooled)
    if compiled is None:
        raise RuntimeError(f"metadist::{name} has no form for {x.dtype} on {x.device} here")
    windows = Windows(*how)
    shape = _Shape(*x.shape, *how[:-1], *windows.outputs(*x.shape[2:4]), outputs)
    pointers = (None if t is None else t.data_ptr() for t in tensors)
    compiled(*pointers, shape, *([windows.pool] if pooled else []))


@operator("pick")
def pick(x: Tensor, a: Tensor, c: Tensor, v: Tensor | None, d: Tensor | None, how: list[int]) -> Tensor:
    """Of each cell the window with the largest ``u = window a + c``, if that is positive: its ``window v + d``; else 0.

    Args:
        x: pictures ``[G, B, H, W, C]``.
        a, c: ``[G, kernel_h * kernel_w * C, O]`` and ``[G, O]``.
        v, d: of the same sizes; None for ``a`` and ``c`` themselves.
        how: the fields of :class:`Windows`.

    Returns:
        ``[G, B, rows // pool, columns // pool, O]``
    """
    x, a, c = x.contiguous(), a.contiguous(), c.contiguous()
    v, d = (None if t is None else t.contiguous() for t in (v, d))
    y = _pick_shape(x, a, c, v, d, how)
    _call("pick", x, how, a.shape[-1], x, a, c, v, d, y)
    return y


@pick.register_fake
def _pick_shape(x: Tensor, a: Tensor, c: Tensor, v: Tensor | None, d: Tensor | None, how: list[int]) -> Tensor:
    rows, columns = Windows(*how).outputs(*x.shape[2:4])
    return x.new_empty(*x.shape[:2], rows // how[-1], columns // how[-1], a.shape[-1])


@operator("push")
def push(x: Tensor, a: Tensor, c: Tensor, slope: Tensor, how: list[int]) -> tuple[Tensor, Tensor]:
    """The transpose of :func:`pick` in ``v`` and ``d``: the slopes in them of an output's ``slope``."""
    x, a, c, slope = (t.contiguous() for t in (x, a, c, slope))
    made = _push_shape(x, a, c, slope, how)
    _call("push", x, how, a.shape[-1], x, a, c, slope, *made)
    return made


@push.register_fake
def _push_shape(x: Tensor, a: Tensor, c: Tensor, slope: Tensor, how: list[int]) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), c.new_empty(c.shape)


@operator("moments")
def moments(x: Tensor, how: list[int]) -> tuple[Tensor, Tensor]:
    """Mean ``[G, N]`` and covariance ``[G, N, N]`` of the N numbers of each group's windows, float64."""
    x = x.contiguous()
    made = _moments_shape(x, how)
    _call("moments", x, how, 0, x, *made, pooled=False)
    return made


@moments.register_fake
def _moments_shape(x: Tensor, how: list[int]) -> tuple[Tensor, Tensor]:
    numbers = how[0] * how[1] * x.shape[-1]
    return (
        x.new_empty(len(x), numbers, dtype=torch.float64),
        x.new_empty(len(x), numbers, numbers, dtype=torch.float64),
    )


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, a: Tensor, c: Tensor, v: Tensor | None, d: Tensor | None, how: list[int]) -> Tensor:
        return pick(x, a, c, v, d, how)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, a, c, v, _, ctx.how = inputs
        ctx.other = v is not None
        ctx.save_for_backward(x, a, c)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        _refuse(ctx.needs_input_grad[0])
        g_v, g_d = _Push.apply(*ctx.saved_tensors, slope, ctx.how)
        return (None, None, None, g_v, g_d, None) if ctx.other else (None, g_v, g_d, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _Pick.apply(*_folded(info.batch_size, in_dims, arguments[:-1]), arguments[-1]).unflatten(
            0, (info.batch_size, -1)
        ), 0


class _Push(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, a: Tensor, c: Tensor, slope: Tensor, how: list[int]) -> tuple[Tensor, Tensor]:
        return push(x, a, c, slope, how)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, _, ctx.how = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor, d: Tensor) -> Any:
        # What is chosen is constant but where two candidates are equal.
        _refuse(ctx.needs_input_grad[0])
        return None, None, None, _Pick.apply(*ctx.saved_tensors, v, d, ctx.how), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        made = _Push.apply(*_folded(info.batch_size, in_dims, arguments[:-1]), arguments[-1])
        return tuple(m.unflatten(0, (info.batch_size, -1)) for m in made), (0, 0)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, how: list[int]) -> tuple[Tensor, Tensor]:
        return moments(x, how)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        return None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, how: list[int]) -> Any:
        made = _Moments.apply(*_folded(info.batch_size, in_dims[:1], (x,)), how)
        return tuple(m.unflatten(0, (info.batch_size, -1)) for m in made), (0, 0)


def _folded(n: int, dims: Any, tensors: Any) -> list[Any]:
    """The tensors of ``n`` members as those of so many more groups."""
    return [None if t is None else members(t, d, n).flatten(0, 1) for t, d in zip(tensors, dims, strict=False)]


def _refuse(wanted: bool) -> None:
    if wanted:
        raise NotImplementedError(
            "metadist::pick has no derivative in its pictures; set engine.fused_norm to false for one"
        )


def tracked(x: Tensor) -> bool:
    """Whether somebody wants derivatives in ``x``, by autograd or by a ``torch.func`` transform."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x) and x.requires_grad:
            return True
        x = functorch.get_unwrapped(x)
    return x.requires_grad


def first_block(
    x: Tensor, filters: Tensor, weight: Tensor, bias: Tensor, eps: float, windows: Windows
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution without a bias, BatchNorm by the pictures' own statistics, ReLU and pooling.

    Args:
        x: pictures ``[N, C, H, W]``, not differentiated by.
        filters: ``[O, C, kernel_h, kernel_w]``.
        weight, bias: of BatchNorm, ``[O]``.
        eps: added to the variance.
        windows: of the convolution, and the pooling.

    Returns:
        Outputs ``[N, O, rows, columns]``; mean and variance of each filter's output before BatchNorm, ``[O]`` both.
    """
    how = list(astuple(windows))
    pictures = x.permute(0, 2, 3, 1)[None]
    centre, spread = _Moments.apply(pictures, how)
    rows = filters.permute(2, 3, 1, 0).flatten(0, 2).double()  # [numbers, O]
    mean, var = centre[0] @ rows, (rows * (spread[0] @ rows)).sum(0)
    scale = weight.double() * torch.rsqrt(var + eps)
    a, c = (scale * rows).to(x.dtype), (bias.double() - scale * mean).to(x.dtype)
    y = _Pick.apply(pictures, a[None], c[None], None, None, how)[0]
    return y.permute(0, 3, 1, 2), mean.to(x.dtype), var.to(x.dtype)
