"""BatchNorm, ReLU and pooling as one: torch's own three are the oracle, to the second derivative."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vjp, vmap

from metadist.inner.kernels.norm import _NormSecond, available, norm_relu_pool

from .oracle import one_by_one

EPS = 1e-5


def torchs(x: Tensor, weight: Tensor, bias: Tensor, pool: int) -> Tensor:
    y = torch.relu(F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS))
    return F.max_pool2d(y, 2) if pool == 2 else y


def ours(x: Tensor, weight: Tensor, bias: Tensor, pool: int) -> Tensor:
    return norm_relu_pool(x, weight, bias, EPS, pool)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    n, c, h, w = draw(st.integers(1, 3)), draw(st.integers(1, 35)), draw(st.integers(2, 7)), draw(st.integers(2, 7))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(n, c, h, w, generator=g, dtype=torch.float64) * 2 + draw(st.sampled_from([0.0, 5.0]))
    # A weight may be negative, which turns the largest input into the smallest.
    weight, bias = (torch.randn(c, generator=g, dtype=torch.float64) for _ in range(2))
    return x, weight, bias, draw(st.sampled_from([1, 2]))


def derivatives(f, x: Tensor, weight: Tensor, bias: Tensor, pool: int) -> tuple[Tensor, ...]:
    """Slopes of a curved function, and the product of its Hessian with a fixed direction."""

    def slopes(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return grad(lambda *a: torch.tanh(f(*a, pool)).pow(2).sum(), argnums=(0, 1, 2))(x, weight, bias)

    g = torch.Generator().manual_seed(1)
    first, back = vjp(slopes, x, weight, bias)
    return *first, *back(tuple(torch.randn(t.shape, generator=g, dtype=t.dtype) for t in first))


def test_it_is_built() -> None:
    assert available(torch.device("cpu"), torch.float32), "this machine builds no C++"
    assert not available(torch.device("cpu"), torch.bfloat16)
    assert not available(torch.device("meta"), torch.float32)


@settings(max_examples=80, deadline=None)
@given(batches())
def test_value_and_two_derivatives_are_those_of_torch(batch) -> None:
    x, weight, bias, pool = batch
    torch.testing.assert_close(ours(*batch), torchs(*batch), rtol=1e-9, atol=1e-9)
    made, wanted = (derivatives(f, x, weight, bias, pool) for f in (ours, torchs))
    for a, b in zip(made, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("pool", [1, 2])
def test_single_precision_is_as_exact_as_torch(pool: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(75, 64, 14, 14, generator=g) * 3 + 100
    weight, bias = torch.randn(64, generator=g), torch.randn(64, generator=g)
    right = torchs(x.double(), weight.double(), bias.double(), pool)
    error, torch_error = ((f(x, weight, bias, pool) - right).norm() / right.norm() for f in (ours, torchs))
    assert error < max(2 * torch_error, 1e-6)


@pytest.mark.parametrize("pool", [1, 2])
def test_each_task_by_itself(pool: int) -> None:
    x = torch.randn(3, 4, 5, 6, 6, dtype=torch.float64)
    weight, bias = (torch.randn(3, 5, dtype=torch.float64) for _ in range(2))
    for dims in ((0, *rest) for rest in itertools.product((0, None), repeat=2)):
        inputs = [t if d == 0 else t[0] for t, d in zip((x, weight, bias), dims, strict=True)]
        made = vmap(lambda *a: derivatives(ours, *a, pool), in_dims=dims, randomness="same")(*inputs)
        wanted = one_by_one(lambda *a: derivatives(torchs, *a, pool), inputs, dims)
        for values, right in zip(made, wanted, strict=True):
            torch.testing.assert_close(values, right, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pool", [1, 2])
def test_the_slope_of_many_tasks_that_share_weights(pool: int) -> None:
    x, weight, bias = torch.randn(3, 4, 5, 6, 6), torch.randn(5), torch.randn(5)

    def total(f, weight: Tensor, bias: Tensor) -> Tensor:
        return vmap(lambda x: f(x, weight, bias, pool))(x).pow(3).sum()

    made, wanted = (grad(lambda w, b, f=f: total(f, w, b), argnums=(0, 1))(weight, bias) for f in (ours, torchs))
    torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pool", [1, 2])
def test_what_is_no_number_stays_none(pool: int) -> None:
    """A bad task must be seen in its loss, not be turned to zero on the way."""
    for bad in (float("nan"), float("inf")):
        x = torch.randn(2, 3, 4, 4)
        x[1, 2, 0, 1] = bad
        y = ours(x, torch.ones(3), torch.zeros(3), pool)
        assert y[:, 2].isnan().all() and y[:, :2].isfinite().all()


def test_there_is_no_third_derivative() -> None:
    x = torch.randn(1, 2, 3, 3)
    with pytest.raises(NotImplementedError, match="engine.fused_norm"):
        _NormSecond.backward(None, x)
