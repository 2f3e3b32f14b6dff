"""Convolution as a product of matrices: the same function, with the same derivatives, compiled or not."""

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
from torch import Tensor, nn
from torch.func import grad, vjp, vmap

from metadist.algorithms import MAML, resolve_objective
from metadist.episode import EpisodeBatch, Examples
from metadist.inner import Engine, FunctionalModel, columns
from metadist.inner.columns import AsProducts, convolution
from metadist.models import Conv4

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


@pytest.mark.parametrize(
    ("call", "taken"),
    [
        (lambda x, w: F.conv2d(x, w), True),
        (lambda x, w: F.conv2d(x, w, stride=2, padding=(1, 0)), True),
        (lambda x, w: F.conv2d(x, w, None, [2], [1]), True),
        (lambda x, w: F.conv2d(x, w, padding="same"), False),
        (lambda x, w: F.conv2d(x, w, dilation=2), False),
        (lambda x, w: F.conv2d(x[0], w), False),
        (lambda x, w: F.conv2d(x, w[:, :2], groups=2), False),
        (lambda x, w: F.conv2d(x.repeat(1, 1, 3, 3), w), False),
    ],
)
def test_what_is_taken_over_and_what_is_left_to_torch(call, taken, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(columns, "convolution", lambda *a: seen.append(1) or convolution(*a))
    x, w = torch.randn(2, 4, 9, 9), torch.randn(6, 4, 3, 3)
    with AsProducts():
        made = call(x, w)
    torch.testing.assert_close(made, call(x, w), rtol=1e-4, atol=1e-4)
    assert bool(seen) == taken


@pytest.mark.parametrize("compiled", [False, True])
def test_the_meta_gradient_of_a_convolutional_network_is_the_same(compiled: bool) -> None:
    torch.manual_seed(0)
    module: nn.Module = Conv4(1, 5, filters=4)
    x = torch.rand(2, 10, 1, 16, 16, dtype=torch.float64)
    y = torch.arange(5).repeat(2, 2)
    batch = EpisodeBatch(Examples(x[:, :5], y[:, :5]), Examples(x[:, 5:], y[:, 5:]))
    gradients = []
    for how in ("direct", "columns"):
        model = FunctionalModel(module, dtype=torch.float64, convolution=how)  # type: ignore[arg-type]
        engine = Engine("vectorised", compile=compiled and how == "columns")
        learner = MAML(inner_lr=0.1, inner_steps=2).bind(model, resolve_objective("auto", y[0]), engine)
        gradients.append(learner.meta_gradient(model.initial_params(), batch).gradient)
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-9, atol=1e-12)


def test_without_a_compiler_the_plain_form_is_used(tmp_path: Path) -> None:
    code = """
import torch
from metadist.inner import columns
x = torch.randn(1, 5, 5, 2)
print(columns._compiled("windows", x.device, x.dtype) is None, columns._windows(x, [3, 3], [1, 1], [1, 1]).shape)
"""
    environment = {"CXX": "/nowhere/c++", "METADIST_CACHE": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1)[0] == "True" and "[1, 5, 5, 18]" in done.stdout
