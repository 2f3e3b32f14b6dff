"""Convolutions summed in registers: the same function as torch's, with the same derivatives, for any groups."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vjp, vmap

from metadist.inner.kernels import taps
from metadist.inner.kernels.taps import convolution, convolve, correlate, spread


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, list[int], list[int]]:
    kernel, stride = ([draw(st.integers(1, 4)) for _ in range(2)] for _ in range(2))
    padding = [draw(st.integers(0, k)) for k in kernel]
    size = [draw(st.integers(max(1, k - 2 * p), 11)) for k, p in zip(kernel, padding, strict=True)]
    n, c, o = draw(st.integers(1, 3)), draw(st.integers(1, 19)), draw(st.integers(1, 35))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    bias = torch.randn(o, generator=g, dtype=torch.float64) if draw(st.booleans()) else None
    x, w = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, c, *size), (o, c, *kernel)))
    return x, w, bias, stride, padding


@settings(max_examples=80, deadline=None)
@given(convolutions())
def test_value_and_derivatives_are_those_of_torch(case) -> None:
    x, w, bias, stride, padding = case

    def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv2d(x, w, bias, stride, padding), convolution(x, w, bias, stride, padding)

    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(*both(x, w), **close)
    slopes = [grad(lambda x, w, i=i: (both(x, w)[i] ** 2).sum(), argnums=(0, 1))(x, w) for i in (0, 1)]
    torch.testing.assert_close(slopes[0], slopes[1], **close)

    def curved(i: int) -> tuple[Tensor, ...]:
        slope = grad(lambda x, w: (torch.tanh(both(x, w)[i] / 9) ** 2).sum(), argnums=(0, 1))
        _, back = vjp(slope, x, w)
        return back((torch.ones_like(x), torch.ones_like(w)))

    torch.testing.assert_close(curved(0), curved(1), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("channels", "outputs"), [(21, 70), (64, 64), (130, 16)])
def test_the_compiled_form_agrees_with_the_plain_one(
    dtype: torch.dtype, shared: bool, channels: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    # More pictures than are worked through at a time; channels that fill whole registers and such that do not.
    x = torch.randn(2, 17, 13, 10, channels, generator=g, dtype=dtype)
    w = torch.randn(1 if shared else 2, 3, 2, channels, outputs, generator=g, dtype=dtype)
    how = [2, 1], [1, 0]

    def all_three() -> tuple[Tensor, Tensor, Tensor]:
        y = convolve(x, w, *how)
        return y, spread(y, w, [13, 10], *how), correlate(x, y, [3, 2], *how)

    assert taps.available(x.device, dtype), "this machine builds no C++"
    made = all_three()
    monkeypatch.setattr(taps, "_compiled", lambda *_: None)
    for ours, plain in zip(made, all_three(), strict=True):
        assert ours.shape == plain.shape and ours.is_contiguous() and plain.is_contiguous()
        error = (ours - plain).norm() / plain.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-13), error


def test_a_result_does_not_depend_on_the_groups_beside_it() -> None:
    """The unit of determinism: bit for bit."""
    x, w, how = torch.randn(3, 4, 9, 9, 16), torch.randn(3, 3, 3, 16, 16), ([2, 2], [1, 1])
    y = convolve(x, w, *how)
    back, of_weight = spread(y, w, [9, 9], *how), correlate(x, y, [3, 3], *how)
    for g in range(3):
        one = slice(g, g + 1)
        assert torch.equal(convolve(x[one], w[one], *how)[0], y[g])
        assert torch.equal(spread(y[one], w[one], [9, 9], *how)[0], back[g])
        assert torch.equal(correlate(x[one], y[one], [3, 3], *how)[0], of_weight[g])


def test_each_task_by_weights_of_its_own() -> None:
    x, w = torch.randn(3, 2, 8, 7, 7, dtype=torch.float64), torch.randn(3, 5, 8, 3, 3, dtype=torch.float64)

    def slopes(conv, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        def slope(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            return grad(lambda x, w: (conv(x, w) ** 3).sum(), argnums=(0, 1))(x, w)

        _, back = vjp(slope, x, w)
        return conv(x, w), *slope(x, w), *back((x, w))

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return convolution(x, w, None, [2, 2], [1, 1])

    def torchs(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, 2, 1)

    for dims in itertools.product((0, None), repeat=2):
        if dims == (None, None):
            continue
        inputs = [t if d == 0 else t[0] for t, d in zip((x, w), dims, strict=True)]
        made, wanted = (
            vmap(lambda x, w, conv=conv: slopes(conv, x, w), in_dims=dims)(*inputs) for conv in (ours, torchs)
        )
        torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-9)


def test_without_a_compiler_windows_are_taken(tmp_path: Path) -> None:
    code = """
import torch
from metadist.inner.kernels import AsProducts, columns, taps
x, w = torch.randn(2, 8, 5, 5), torch.randn(9, 8, 3, 3)
print(taps.available(x.device, x.dtype))
real, seen = columns.convolution, []
columns.convolution = lambda *given: seen.append(1) or real(*given)
with AsProducts(fast=True):
    print(torch.nn.functional.conv2d(x, w, stride=2).shape, len(seen))
"""
    environment = {"CXX": "/nowhere/c++", "METADIST_CACHE": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["False", "torch.Size([2, 9, 2, 2]) 1"]
