"""A traced or compiled meta-gradient is the same function, and is made once for each shape."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from metadist.algorithms import MAML, resolve_objective
from metadist.episode import EpisodeBatch, Examples
from metadist.inner import Engine, FunctionalModel, compiler_missing
from metadist.inner.memory import resident_growth
from metadist.inner.program import merge_duplicates, trace
from metadist.models import MLP


def batch(tasks: int) -> EpisodeBatch:
    generator = torch.Generator().manual_seed(tasks)
    x = torch.randn(tasks, 6, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(tasks, 6, 2, generator=generator, dtype=torch.float64)
    return EpisodeBatch(Examples(x[:, :3], y[:, :3]), Examples(x[:, 3:], y[:, 3:]))


@pytest.mark.skipif(bool(compiler_missing()), reason=f"cannot compile: {compiler_missing()}")
@pytest.mark.parametrize(
    ("compile", "recompute", "first_order"),
    [
        ("trace", False, False),
        ("trace", True, False),
        ("trace", False, True),
        ("trace", True, True),
        pytest.param(True, False, False, marks=pytest.mark.slow),
        pytest.param(True, True, False, marks=pytest.mark.slow),
        pytest.param(True, False, True, marks=pytest.mark.slow),
        pytest.param(True, True, True, marks=pytest.mark.slow),
    ],
)
def test_a_program_equals_eager(compile, recompute, first_order):
    torch.manual_seed(0)
    model = FunctionalModel(MLP(3, 2, hidden=(4,)), dtype=torch.float64)
    results = {}
    for compiled in (False, compile):
        learner = MAML(inner_lr=0.1, inner_steps=2, first_order=first_order)
        engine = Engine("vectorised", compile=compiled, recompute=recompute)
        learner.bind(model, resolve_objective("mse", batch(2).query.y[0]), engine)
        results[compiled] = [learner.meta_gradient(model.initial_params(), batch(t)) for t in (3, 2, 3)]
    for eager, fast in zip(results[False], results[compile], strict=True):
        for name, value in eager.gradient.items():
            torch.testing.assert_close(fast.gradient[name], value, rtol=1e-10, atol=1e-12)
        for name, value in eager.metrics.items():
            torch.testing.assert_close(fast.metrics[name], value, rtol=1e-10, atol=1e-12)
    gradient, before = engine._programs.values()
    for program in (gradient, before):
        assert program.shapes == 2, "one program for each number of tasks, none made twice"
    first, _, again = results[compile]
    assert all(torch.equal(first.gradient[k], again.gradient[k]) for k in first.gradient)


def graph_of(fn, *tensors: torch.Tensor, data: int, everything: bool) -> list[str]:
    flat, spec = pytree.tree_flatten(tensors)
    module, _ = trace(lambda *a: fn(*a), flat, spec)
    merge_duplicates(module, data, everything)
    torch.testing.assert_close(module(*flat)[0], fn(*tensors))
    return [str(n.target) for n in module.graph.nodes if n.op == "call_function"]


def test_what_is_computed_twice_is_computed_once_if_it_may_be_kept() -> None:
    def fn(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x.exp() + x.exp() + w.sin() + w.sin() + (w * x).cos() + (w * x).cos()

    w, x = torch.randn(3), torch.randn(3)
    kept = graph_of(fn, w, x, data=1, everything=True)
    assert [sum(name in op for op in kept) for name in ("exp", "sin", "cos", "mul")] == [1, 1, 1, 1]
    again = graph_of(fn, w, x, data=1, everything=False)
    assert [sum(name in op for op in again) for name in ("exp", "sin", "cos", "mul")] == [1, 2, 2, 2]


def test_random_numbers_are_never_taken_for_one() -> None:
    w = torch.ones(1000)
    module, _ = trace(lambda w: torch.rand_like(w) - torch.rand_like(w), [w], pytree.tree_flatten((w,))[1])
    merge_duplicates(module, 0, everything=True)
    assert module(w)[0].abs().sum() > 0


def test_what_is_written_in_place_is_not_taken_for_what_was_there_before() -> None:
    def fn(w: torch.Tensor) -> torch.Tensor:
        blank = torch.zeros_like(w)
        blank[0] += w[1]
        return blank + torch.zeros_like(w) + w * 2 + w * 2.0

    graph_of(fn, torch.randn(3), data=0, everything=True)


def test_an_inner_step_is_kept_or_computed_again_as_said() -> None:
    model = FunctionalModel(MLP(3, 2, hidden=(4,)), dtype=torch.float64)
    sizes = {}
    for recompute in (False, True):
        engine = Engine("vectorised", "trace", recompute)
        learner = MAML(inner_lr=0.1, inner_steps=4).bind(model, resolve_objective("mse", batch(2).query.y[0]), engine)
        learner.meta_gradient(model.initial_params(), batch(2))
        ((program, *_),) = (p._programs.values() for p in list(engine._programs.values())[:1])
        sizes[recompute] = len(program[0].graph.nodes)
    assert sizes[True] > 1.1 * sizes[False]


def test_branching_on_values_is_refused_by_tracing() -> None:
    with pytest.raises(RuntimeError):
        trace(lambda x: x if x.sum() > 0 else -x, [torch.ones(2)], pytree.tree_flatten((torch.ones(2),))[1])


def test_tracing_takes_no_memory_for_values() -> None:
    """A trace would keep every value it comes by: with the derivatives of all inner steps, many times a step's."""
    before = torch.ones(1_000_000)
    flat, spec = pytree.tree_flatten((before, before))

    def fn(shared, tasks):
        kept = [tasks]
        for _ in range(60):
            kept.append(torch.exp(kept[-1] * shared))
        return sum(kept)

    trace(fn, [t[:10] for t in flat], spec)  # what tracing itself needs, once
    grown = resident_growth()
    graph, _ = trace(fn, flat, spec)
    assert grown() < 60 * before.nbytes / 4
    with torch.no_grad():
        assert torch.equal(graph(*flat)[0], fn(before, before))


def test_constants_of_a_traced_function_keep_their_values() -> None:
    outside = torch.randn(3)

    def fn(shared, tasks):
        within = torch.tensor([1.0, 2.0, 4.0]) + torch.arange(3) + torch.full((3,), 0.5)
        return {"y": shared * outside + tasks * within}

    flat, spec = pytree.tree_flatten((torch.randn(3), torch.randn(3)))
    graph, out_spec = trace(fn, flat, spec)
    for _ in range(2):
        flat = [torch.randn(3), torch.randn(3)]
        assert torch.equal(pytree.tree_unflatten(graph(*flat), out_spec)["y"], fn(*flat)["y"])


def test_tracing_draws_no_random_numbers() -> None:
    flat, spec = pytree.tree_flatten((torch.randn(5), torch.randn(5)))
    torch.manual_seed(4)
    trace(lambda shared, tasks: shared + torch.rand(5) * tasks, flat, spec)
    first = torch.rand(3)
    torch.manual_seed(4)
    assert torch.equal(first, torch.rand(3))
