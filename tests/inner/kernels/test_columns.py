"""Convolution as a product of matrices: the same function, with the same derivatives, compiled or not."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vjp, vmap

from metadist.inner.kernels import columns
from metadist.inner.kernels.columns import convolution

pair = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(list)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, list[int], list[int]]:
    kernel, stride = draw(pair), draw(pair)
    padding = [draw(st.integers(0, k - 1)) for k in kernel]
    size = [draw(st.integers(max(1, k - 2 * p), 9)) for k, p in zip(kernel, padding, strict=True)]
    n, c, o = (draw(st.integers(1, 3)) for _ in range(3))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    bias = torch.randn(o, generator=g, dtype=torch.float64) if draw(st.booleans()) else None
    x, w = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, c, *size), (o, c, *kernel)))
    return x, w, bias, stride, padding


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_value_and_derivatives_are_those_of_torch(case) -> None:
    x, w, bias, stride, padding = case

    def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv2d(x, w, bias, stride, padding), convolution(x, w, bias, stride, padding)

    torch.testing.assert_close(*both(x, w))
    slopes = [grad(lambda x, w, i=i: (both(x, w)[i] ** 3).sum(), argnums=(0, 1))(x, w) for i in (0, 1)]
    torch.testing.assert_close(slopes[0], slopes[1])

    def curved(i: int) -> tuple[Tensor, ...]:
        _, back = vjp(lambda x, w: grad(lambda x, w: (both(x, w)[i] ** 3).sum(), argnums=(0, 1))(x, w), x, w)
        return back((torch.ones_like(x), torch.ones_like(w)))

    torch.testing.assert_close(curved(0), curved(1))


@settings(max_examples=40, deadline=None)
@given(convolutions(), st.sampled_from([torch.float32, torch.float64]))
def test_the_compiled_form_has_the_bits_of_the_plain_one(case, dtype) -> None:
    """So that a run gives one answer whether or not a machine has a compiler."""
    x, w, _, stride, padding = case
    x, kernel = x.permute(0, 2, 3, 1).contiguous().to(dtype), list(w.shape[2:])
    rows = columns._windows(x, kernel, stride, padding)
    assert columns._compiled("windows", x.device, dtype) is not None, "this machine builds no C++"
    assert torch.equal(rows, columns._plain_windows(x, kernel, stride, padding, rows.shape[1:3]))
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    summed = columns._sum_windows(noise, list(x.shape[1:3]), kernel, stride, padding)
    assert torch.equal(summed, columns._plain_sum_windows(noise, x.shape, kernel, stride, padding))
    # Transposes of each other: <windows(x), r> = <x, sum_windows(r)>.
    torch.testing.assert_close((rows * noise).sum().double(), (x * summed).sum().double(), rtol=1e-4, atol=1e-4)


def test_each_task_by_weights_of_its_own() -> None:
    x, w = torch.randn(3, 2, 4, 7, 7), torch.randn(3, 5, 4, 3, 3)
    for dims in itertools.product((0, None), repeat=2):
        if dims == (None, None):
            continue
        inputs = [t if d == 0 else t[0] for t, d in zip((x, w), dims, strict=True)]
        made = vmap(lambda x, w: convolution(x, w, None, [2, 2], [1, 1]), in_dims=dims)(*inputs)
        wanted = vmap(lambda x, w: F.conv2d(x, w, None, 2, 1), in_dims=dims)(*inputs)
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


def test_without_a_compiler_the_plain_form_is_used(tmp_path: Path) -> None:
    code = """
import torch
from metadist.inner.kernels import columns
x = torch.randn(1, 5, 5, 2)
print(columns._compiled("windows", x.device, x.dtype) is None, columns._windows(x, [3, 3], [1, 1], [1, 1]).shape)
"""
    environment = {"CXX": "/nowhere/c++", "METADIST_CACHE": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1)[0] == "True" and "[1, 5, 5, 18]" in done.stdout
