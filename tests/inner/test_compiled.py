"""A compiled meta-gradient is the same function, and is compiled once for each shape."""

from __future__ import annotations

import pytest
import torch

from metadist.algorithms import MAML, resolve_objective
from metadist.episode import EpisodeBatch, Examples
from metadist.inner import Engine, FunctionalModel, compiler_missing
from metadist.models import MLP


def batch(tasks: int) -> EpisodeBatch:
    generator = torch.Generator().manual_seed(tasks)
    x = torch.randn(tasks, 6, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(tasks, 6, 2, generator=generator, dtype=torch.float64)
    return EpisodeBatch(Examples(x[:, :3], y[:, :3]), Examples(x[:, 3:], y[:, 3:]))


@pytest.mark.skipif(bool(compiler_missing()), reason=f"cannot compile: {compiler_missing()}")
@pytest.mark.parametrize("first_order", [False, True])
def test_compiled_equals_eager(first_order):
    torch.manual_seed(0)
    model = FunctionalModel(MLP(3, 2, hidden=(4,)), dtype=torch.float64)
    results = {}
    for compiled in (False, True):
        learner = MAML(inner_lr=0.1, inner_steps=2, first_order=first_order)
        engine = Engine("vectorised", compile=compiled)
        learner.bind(model, resolve_objective("mse", batch(2).query.y[0]), engine)
        results[compiled] = [learner.meta_gradient(model.initial_params(), batch(t)) for t in (3, 2, 3)]
    for eager, fast in zip(results[False], results[True], strict=True):
        for name, value in eager.gradient.items():
            torch.testing.assert_close(fast.gradient[name], value, rtol=1e-10, atol=1e-12)
        for name, value in eager.metrics.items():
            torch.testing.assert_close(fast.metrics[name], value, rtol=1e-10, atol=1e-12)
    gradient, before = engine._compiled.values()
    for program in (gradient, before):
        assert len(program._programs) == 2, "one program for each number of tasks, none made twice"
    first, _, again = results[True]
    assert all(torch.equal(first.gradient[k], again.gradient[k]) for k in first.gradient)
