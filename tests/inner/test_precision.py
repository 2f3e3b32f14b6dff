"""Products in few bits: what is rounded, what is not, and what it does to a meta-gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.algorithms import MAML, TaskResults, resolve_objective
from metadist.episode import EpisodeBatch, Examples
from metadist.inner import Convolution, Engine, FunctionalModel
from metadist.inner.engine import Strategy
from metadist.inner.precision import RoundedProducts
from metadist.models import Conv4

LOW = torch.bfloat16


def rounded(t: Tensor) -> Tensor:
    return t.to(LOW).float()


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.linear(x, w), lambda x, w: x @ w.T, lambda x, w: torch.matmul(x, w.T),
        lambda x, w: x.mm(w.T), lambda x, w: torch.bmm(x[None], w.T[None])[0],
        lambda x, w: F.conv2d(x[..., None, None], w[..., None, None]).flatten(1),
        lambda x, w: torch.func.functional_call(torch.nn.Linear(8, 5, bias=False), {"weight": w}, (x,)).detach(),
    ],
)  # fmt: skip
def test_the_factors_of_products_are_rounded_and_the_result_is_wide(call) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(6, 8, generator=generator), torch.randn(5, 8, generator=generator)
    with RoundedProducts(LOW):
        made = call(x, w)
    exact = (rounded(x).double() @ rounded(w).double().T).float()
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, rounded(exact), rtol=2**-7, atol=1e-6)
    assert not torch.allclose(made, x @ w.T, rtol=1e-5, atol=1e-6)


def test_sums_and_losses_are_not_rounded() -> None:
    x = torch.tensor([1.0, 2.0**-12])
    with RoundedProducts(LOW):
        assert float(x.sum()) == 1 + 2.0**-12 and torch.equal(x * x, torch.stack([v * v for v in x]))


def learned(products: torch.dtype | None, strategy: Strategy, compile: bool | str, how: Convolution) -> TaskResults:
    torch.manual_seed(0)
    module = Conv4(1, 3, filters=16)
    x, y = torch.rand(2, 12, 1, 28, 28), torch.arange(3).repeat(2, 4)
    batch = EpisodeBatch(Examples(x[:, :6], y[:, :6]), Examples(x[:, 6:], y[:, 6:]))
    model = FunctionalModel(module, convolution=how, fused_norm=compile == "trace", products=products)
    learner = MAML(inner_lr=0.01, inner_steps=2)
    learner.bind(model, resolve_objective("auto", y[0]), Engine(strategy, compile))  # type: ignore[arg-type]
    return learner.meta_gradient(learner.initial_meta_params(), batch)


@pytest.mark.parametrize(
    ("strategy", "compile", "how"),
    [("vectorised", False, "direct"), ("vectorised", "trace", "columns"), ("loop", False, "direct")],
)
def test_the_meta_gradient_is_that_of_single_precision_but_for_rounding(strategy, compile, how) -> None:
    full, low = (learned(p, strategy, compile, how) for p in (None, LOW))
    a, b = (torch.cat([v.flatten() for v in r.gradient.values()]) for r in (full, low))
    assert b.dtype == torch.float32
    error = float((a - b).norm() / a.norm())
    assert 1e-3 < error < 0.3, error
    assert float(torch.cosine_similarity(a, b, 0)) > 0.95
    torch.testing.assert_close(low.metrics["loss"], full.metrics["loss"], rtol=0.05, atol=0.02)
