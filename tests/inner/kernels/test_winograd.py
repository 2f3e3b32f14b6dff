"""Winograd's convolution: the same function as torch's, with the same derivatives, for any groups."""

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

from metadist.inner.kernels import winograd
from metadist.inner.kernels.winograd import convolution, convolve, correlate


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, list[int]]:
    padding = [draw(st.integers(0, 2)) for _ in range(2)]
    size = [draw(st.integers(3 - min(p, 1), 11)) for p in padding]
    n, c, o = draw(st.integers(1, 3)), draw(st.integers(1, 19)), draw(st.integers(1, 35))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    bias = torch.randn(o, generator=g, dtype=torch.float64) if draw(st.booleans()) else None
    x, w = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, c, *size), (o, c, 3, 3)))
    return x, w, bias, padding


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_value_and_derivatives_are_those_of_torch(case) -> None:
    x, w, bias, padding = case

    def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv2d(x, w, bias, 1, padding), convolution(x, w, bias, padding)

    close = {"rtol": 1e-8, "atol": 1e-8}
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
def test_the_compiled_form_agrees_with_the_plain_one(dtype: torch.dtype, shared: bool) -> None:
    g = torch.Generator().manual_seed(0)
    # More tiles than are worked through at a time, and channels that fill no whole register.
    x = torch.randn(2, 7, 13, 10, 21, generator=g, dtype=dtype)
    w = torch.randn(1 if shared else 2, 3, 3, 21, 70, generator=g, dtype=dtype)
    assert winograd._compiled("convolve", x) is not None, "this machine builds no C++"
    y, wanted = convolve(x, w, [1, 1]), winograd._plain_convolve(x, w, [1, 1])
    back, wanted_back = correlate(x, y, [1, 1]), winograd._plain_correlate(x, y, [1, 1])
    for made, right in ((y, wanted), (back, wanted_back)):
        error = (made - right).norm() / right.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-13), error


def test_a_result_does_not_depend_on_the_groups_beside_it() -> None:
    """The unit of determinism: bit for bit."""
    x, w = torch.randn(3, 4, 9, 9, 16), torch.randn(3, 3, 3, 16, 16)
    together = convolve(x, w, [1, 1])
    for g in range(3):
        assert torch.equal(convolve(x[g : g + 1], w[g : g + 1], [1, 1])[0], together[g])


def test_each_task_by_weights_of_its_own() -> None:
    x, w = torch.randn(3, 2, 8, 7, 7, dtype=torch.float64), torch.randn(3, 5, 8, 3, 3, dtype=torch.float64)

    def slopes(conv, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return conv(x, w), *grad(lambda x, w: (conv(x, w) ** 3).sum(), argnums=(0, 1))(x, w)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return convolution(x, w, None, [1, 1])

    def torchs(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, 1, 1)

    for dims in itertools.product((0, None), repeat=2):
        if dims == (None, None):
            continue
        inputs = [t if d == 0 else t[0] for t, d in zip((x, w), dims, strict=True)]
        made, wanted = (
            vmap(lambda x, w, conv=conv: slopes(conv, x, w), in_dims=dims)(*inputs) for conv in (ours, torchs)
        )
        torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-9)


def test_without_a_compiler_the_plain_form_is_used(tmp_path: Path) -> None:
    code = """
import torch
from metadist.inner.kernels import winograd
x = torch.randn(1, 2, 5, 5, 8)
print(winograd._compiled("convolve", x) is None, winograd.convolve(x, torch.randn(1, 3, 3, 8, 4), [1, 1]).shape)
"""
    environment = {"CXX": "/nowhere/c++", "METADIST_CACHE": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1)[0] == "True" and "[1, 2, 5, 5, 4]" in done.stdout
