"""BatchNorm by each task's own statistics, ReLU and max pooling as one operator, with its second derivative.

What follows a convolution moves more memory than the convolution itself, and differentiated twice torch writes out some
dozens of pictures for it. Here each derivative reads what it needs twice and writes once. With ``u`` normalised, scaled
and shifted, the output is ``max(0, max of u over each 2x2 cell)`` (or ``max(0, u)``); the formulas of the second
derivative are worked out beside the code in norm.cpp. There is no third.

Only where the C++ is built (:func:`available`) and on the CPU; elsewhere torch's own operators are used.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metadist.inner.kernels.build import function
from metadist.inner.kernels.groups import members
from metadist.inner.kernels.operator import operator

_SOURCE = Path(__file__).with_name("norm.cpp")


class _Shape(ctypes.Structure):
    """As in norm.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("groups", "weight_groups", "batch", "height", "width", "channels")),
        ("eps", ctypes.c_double),
    ]


def _call(name: str, x: Tensor, weight: Tensor, eps: float, pool: int, *tensors: Tensor) -> None:
    compiled = _compiled(name, x.device, x.dtype, len(tensors))
    if compiled is None:
        raise RuntimeError(f"metadist::{name} has no form for {x.dtype} on {x.device} here")
    groups, batch, height, width, channels = x.shape
    shape = _Shape(groups, len(weight), batch, height, width, channels, eps)
    compiled(*(t.data_ptr() for t in tensors), shape, pool)


def _compiled(name: str, device: torch.device, dtype: torch.dtype, tensors: int) -> Any:
    pointers = (ctypes.c_void_p,) * tensors
    return function(_SOURCE, name, device, dtype, (*pointers, ctypes.POINTER(_Shape), ctypes.c_int64))


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the operator can be had for such tensors."""
    return _compiled("norm", device, dtype, 6) is not None


@operator("norm")
def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[G, B, H // pool, W // pool, C]``; means and inverse standard deviations, ``[G, C]`` both.

    Args:
        x: ``[G, B, H, W, C]``; each group is normalised by itself.
        weight, bias: ``[G, C]``, or ``[1, C]`` for all groups.
        eps: added to the variance.
        pool: 2 for 2x2 max pooling, 1 for none.
    """
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    made = _norm_shape(x, weight, bias, eps, pool)
    _call("norm", x, weight, eps, pool, x, weight, bias, *made)
    return made


@_norm.register_fake
def _norm_shape(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: int) -> tuple[Tensor, Tensor, Tensor]:
    groups, batch, height, width, channels = x.shape
    statistics = (x.new_empty(groups, channels) for _ in range(2))
    return x.new_empty(groups, batch, height // pool, width // pool, channels), *statistics  # type: ignore[return-value]


@operator("norm_backward")
def _norm_backward(
    slope: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, pool: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The slopes in ``x``, and in each group's weight and bias ``[G, C]``, of an output's ``slope``."""
    inputs = [t.contiguous() for t in (slope, x, mean, rstd, weight, bias)]
    made = _norm_backward_shape(*inputs, pool)
    _call("norm_backward", x, weight, 0.0, pool, *inputs, *made)
    return made


@_norm_backward.register_fake
def _norm_backward_shape(
    slope: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, pool: int
) -> tuple[Tensor, Tensor, Tensor]:
    made = (x.new_empty(x.shape[0], x.shape[-1]) for _ in range(2))
    return x.new_empty(x.shape), *made  # type: ignore[return-value]


@operator("norm_second")
def _norm_second(
    p: Tensor, q: Tensor, t: Tensor, slope: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    pool: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """With ``norm_backward``'s results weighed by ``p``, ``q`` and ``t``: the slopes in its slope, ``x`` and weight."""
    inputs = [v.contiguous() for v in (p, q, t, slope, x, mean, rstd, weight, bias)]
    made = _norm_second_shape(*inputs, pool)
    _call("norm_second", x, weight, 0.0, pool, *inputs, *made)
    return made


@_norm_second.register_fake
def _norm_second_shape(
    p: Tensor, q: Tensor, t: Tensor, slope: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    pool: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty(slope.shape), x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[-1])


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: int) -> Any:
        return _norm(x, weight, bias, eps, pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, _, ctx.pool = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, *output[1:], weight, bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *statistics: Any) -> Any:
        weight = ctx.saved_tensors[3]
        g_x, *rest = _NormBackward.apply(slope, *ctx.saved_tensors, ctx.pool)
        return g_x, *(_shared(g, weight) for g in rest), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: int) -> Any:
        return _folded(_Norm, info.batch_size, in_dims, (x, weight, bias), (1, 2), (eps, pool))


class _NormBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        slope: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, pool: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _norm_backward(slope, x, mean, rstd, weight, bias, pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.pool = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *weighed: Tensor) -> Any:
        # The statistics are functions of x: their part is in its slope. The bias only moves what is chosen.
        d_slope, d_x, d_weight = _NormSecond.apply(*weighed, *ctx.saved_tensors, ctx.pool)
        return d_slope, d_x, None, None, _shared(d_weight, ctx.saved_tensors[4]), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _folded(_NormBackward, info.batch_size, in_dims, arguments[:-1], (4, 5), arguments[-1:])


class _NormSecond(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _norm_second(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        raise NotImplementedError("metadist::norm has no third derivative; set engine.fused_norm to false for one")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _folded(_NormSecond, info.batch_size, in_dims, arguments[:-1], (7, 8), arguments[-1:])


def _shared(slope: Tensor, weight: Tensor) -> Tensor:
    """The slope ``[G, C]`` summed over the groups that share a weight."""
    return slope.sum(0, keepdim=True) if len(weight) < len(slope) else slope


def _folded(fn: Any, n: int, dims: Any, tensors: Any, weights: tuple[int, ...], options: Any) -> Any:
    """``fn`` for ``n`` members as for so many more groups.

    Args:
        fn: the function; its tensors begin with groups.
        dims: the vmapped dimension of each tensor, or None.
        tensors: its tensors.
        weights: places among them of those which all groups may share.
        options: its other arguments.
    """
    share = all(dims[i] is None and len(tensors[i]) == 1 for i in weights)
    moved = [members(t, d, n) for t, d in zip(tensors, dims, strict=False)]
    groups = max(t.shape[1] for t in moved)
    folded = [
        tensors[i] if i in weights and share else t.expand(n, groups, *t.shape[2:]).flatten(0, 1)
        for i, t in enumerate(moved)
    ]
    made = fn.apply(*folded, *options)
    return tuple(m.unflatten(0, (n, -1)) for m in made), (0,) * len(made)


def norm_relu_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: int = 1) -> Tensor:
    """ReLU of the batch normalisation of ``x [N, C, H, W]`` by its own statistics, max pooled.

    Args:
        weight, bias: ``[C]``.
        eps: added to the variance.
        pool: 2 for 2x2 max pooling with stride 2, 1 for none.
    """
    return _Norm.apply(x.permute(0, 2, 3, 1)[None], weight[None], bias[None], eps, pool)[0][0].permute(0, 3, 1, 2)
