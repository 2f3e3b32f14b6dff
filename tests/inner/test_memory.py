"""Memory is counted, foretold without computing, and kept within a stated bound by the same gradient more slowly."""

from __future__ import annotations

import gc

import torch
from torch import nn

from metadist.inner import FunctionalModel
from metadist.inner.memory import peak_bytes, predicted_peak_bytes, resident_growth

MB = 1 << 20


def numbers(mb: int) -> torch.Tensor:
    return torch.ones(mb * MB // 4)


def test_what_is_dropped_is_counted_no_more() -> None:
    def call() -> torch.Tensor:
        a = numbers(4)
        b = a * 2  # 8
        del a
        c = b + 1  # 8
        d = c[: len(c) // 2].view(-1, 2)  # a view takes nothing
        del b, c
        return torch.cat([d, d])  # c's storage is alive through d: 4 + 4

    assert peak_bytes(call) == 8 * MB


def test_what_was_there_before_is_not_counted_and_what_grows_is() -> None:
    given = numbers(4)
    assert peak_bytes(lambda: given.add_(1)) == 0
    assert peak_bytes(lambda: given.view(2, -1)) == 0
    assert peak_bytes(lambda: [given + i for i in range(3)]) == 12 * MB


def test_the_graph_of_a_derivative_is_counted() -> None:
    x = numbers(2)

    def loss(x: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            x = torch.sin(x)
        return x.sum()

    forward = peak_bytes(lambda: loss(x))
    both = peak_bytes(lambda: torch.func.grad(loss)(x))
    assert forward == 4 * MB and both >= 10 * MB


def test_a_prediction_holds_and_allocates_nothing() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda v: torch.tanh(torch.outer(v, v)).sum())(x)

    small = torch.randn(300)
    assert predicted_peak_bytes(call, small) == peak_bytes(lambda: call(small))
    growth = resident_growth()
    assert predicted_peak_bytes(call, torch.randn(20_000)) > 1600 * 10**6
    assert growth() < 200 * 10**6


def test_growth_is_since_now() -> None:
    gc.collect()  # what earlier tests left would be freed in the middle of this one, and make room for what it takes
    torch.ones(64 * MB // 4)
    growth = resident_growth()
    assert growth() < 16 * MB
    kept = torch.ones(64 * MB // 4)
    assert 56 * MB < growth() < 96 * MB
    del kept
    assert growth() > 56 * MB, "the largest, not the last"


def test_a_model_that_let_go_computes_as_before_and_holds_nothing() -> None:
    torch.manual_seed(0)
    model = FunctionalModel(nn.Sequential(nn.Linear(8, 1000), nn.ReLU(), nn.Linear(1000, 4)))
    params, x = model.initial_params(), torch.randn(3, 8)
    before = model(params, x)
    model.let_go_of_initial_params()
    assert sum(p.untyped_storage().nbytes() for p in model.module.parameters()) == 4 * 4
    assert {k: v.shape for k, v in model.initial_params().items()} == {k: v.shape for k, v in params.items()}
    assert torch.equal(model(params, x), before)
