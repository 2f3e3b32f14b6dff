"""The first block as one operator: torch's own four are the oracle, to the second derivative and beyond."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vjp, vmap

from metadist.inner.kernels.patches import Windows, available, first_block, moments, tracked

from .oracle import one_by_one

EPS = 1e-5


def torchs(x: Tensor, filters: Tensor, weight: Tensor, bias: Tensor, w: Windows) -> Tensor:
    y = F.conv2d(x, filters, None, (w.stride_h, w.stride_w), (w.pad_h, w.pad_w))
    # Not F.batch_norm, whose third derivative is wrong.
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0, keepdim=True)
    y = torch.relu((y - mean) * torch.rsqrt(var + EPS) * weight[:, None, None] + bias[:, None, None])
    return F.max_pool2d(y, 2) if w.pool == 2 else y


def ours(x: Tensor, filters: Tensor, weight: Tensor, bias: Tensor, w: Windows) -> Tensor:
    return first_block(x, filters, weight, bias, EPS, w)[0]


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, Windows]:
    kernel, stride = ([draw(st.integers(1, 3)) for _ in range(2)] for _ in range(2))
    padding = [draw(st.integers(0, k - 1)) for k in kernel]
    size = [draw(st.integers(max(4, k), 9)) for k in kernel]
    windows = Windows(*kernel, *stride, *padding, 1)
    if min(windows.outputs(*size)) >= 2 and draw(st.booleans()):
        windows = Windows(*kernel, *stride, *padding, 2)
    n, c, o = draw(st.integers(2, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 35))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shapes = ((n, c, *size), (o, c, *kernel), (o,), (o,))
    return *(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes), windows  # type: ignore[return-value]


def derivatives(f, x: Tensor, *rest) -> tuple[Tensor, ...]:
    """Slopes of a curved function in what is learned, the Hessian times a direction, and that once more."""
    *learned, windows = rest

    def slopes(*learned: Tensor) -> tuple[Tensor, ...]:
        return grad(lambda *a: torch.tanh(f(x, *a, windows)).pow(2).sum(), argnums=(0, 1, 2))(*learned)

    g = torch.Generator().manual_seed(1)
    along = tuple(torch.randn(t.shape, generator=g, dtype=t.dtype) for t in learned)
    first, back = vjp(slopes, *learned)
    third = vjp(lambda *a: vjp(slopes, *a)[1](along), *learned)[1](along)
    return *first, *back(along), *third


def test_it_is_built() -> None:
    assert available(torch.device("cpu"), torch.float32), "this machine builds no C++"
    assert not available(torch.device("cpu"), torch.float16)


@settings(max_examples=60, deadline=None)
@given(blocks())
def test_value_and_derivatives_are_those_of_torch(block) -> None:
    torch.testing.assert_close(ours(*block), torchs(*block), rtol=1e-9, atol=1e-9)
    for made, wanted in zip(derivatives(ours, *block), derivatives(torchs, *block), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-6)


def test_statistics_are_those_of_the_convolution() -> None:
    x, filters = torch.rand(4, 3, 9, 9), torch.randn(5, 3, 3, 3)
    _, mean, var = first_block(x, filters, torch.ones(5), torch.zeros(5), EPS, Windows(3, 3, 1, 1, 1, 1))
    y = F.conv2d(x, filters, None, 1, 1)
    torch.testing.assert_close(mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(var, y.var((0, 2, 3), correction=0))


def test_a_filter_of_small_variance_on_smooth_pictures_stays_exact() -> None:
    """The variance of an edge detector on smooth bright pictures is a small difference of large covariances."""
    ramp = torch.linspace(0, 3, 84).sin()
    x = 100 + (ramp[:, None] + ramp[None])[None, None] * torch.rand(8, 1, 1, 1)
    filters = torch.tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]])
    args = (filters, torch.ones(1), torch.zeros(1))
    windows = Windows(3, 3)
    right = torchs(x.double(), *(a.double() for a in args), windows)
    error, torch_error = ((f(x, *args, windows) - right).norm() / right.norm() for f in (ours, torchs))
    assert error < 1.5 * torch_error


def test_each_task_by_itself() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 1, 8, 8), (3, 5, 1, 3, 3), (3, 5), (3, 5))
    inputs = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    windows = Windows(3, 3, 1, 1, 1, 1, 2)
    for dims in ((0, 0, 0, 0), (0, None, None, None), (0, 0, None, 0), (None, 0, 0, 0)):
        given_ = [t if d == 0 else t[0] for t, d in zip(inputs, dims, strict=True)]
        made = vmap(lambda *a: derivatives(ours, *a, windows), in_dims=dims, randomness="same")(*given_)
        wanted = one_by_one(lambda *a: derivatives(torchs, *a, windows), given_, dims)
        for values, right in zip(made, wanted, strict=True):
            torch.testing.assert_close(values, right, rtol=1e-7, atol=1e-7)


def test_whether_derivatives_in_the_pictures_are_wanted_is_seen_through_every_transform() -> None:
    x = torch.randn(2, 3)
    seen: list[bool] = []

    def look(x: Tensor, w: Tensor) -> Tensor:
        seen.append(tracked(x))
        return (x * w).sum()

    look(x, x)
    grad(look, argnums=1)(x, x)
    vmap(grad(look, argnums=1))(x, x)
    assert seen == [False] * 3
    look(x.clone().requires_grad_(), x)
    grad(look)(x, x)
    vmap(grad(look))(x, x)
    grad(lambda x, w: vmap(look)(x, w).sum())(x, x)
    grad(lambda w: look(w * 2, w))(x)
    assert seen[3:] == [True] * 5


def test_a_derivative_in_the_pictures_is_refused_rather_than_left_out() -> None:
    filters, ones = torch.randn(5, 1, 3, 3), torch.ones(5)
    with pytest.raises(NotImplementedError, match="engine.fused_norm"):
        grad(lambda x: first_block(x, filters, ones, ones, EPS, Windows(3, 3))[0].sum())(torch.randn(2, 1, 8, 8))


def test_what_is_no_number_stays_none() -> None:
    x = torch.randn(2, 1, 6, 6)
    x[0, 0, 3, 3] = float("nan")
    assert ours(x, torch.randn(5, 1, 3, 3), torch.ones(5), torch.ones(5), Windows(3, 3, pool=2)).isnan().all()
    assert moments(x.permute(0, 2, 3, 1)[None], [3, 3, 1, 1, 0, 0, 1])[0].isnan().all()
