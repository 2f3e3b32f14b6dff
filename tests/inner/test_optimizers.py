"""Inner optimizers: torch's own as the oracle, and differentiable where torch's are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch.func import grad

from metadist.inner import Tensors
from metadist.inner.optimizers import SGD, Adam, InnerOptimizer, Momentum, make_optimizer

LR, STEPS = 0.03, 6
Theirs = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

PAIRS: dict[str, tuple[InnerOptimizer, Theirs]] = {
    "sgd": (SGD(), lambda p: torch.optim.SGD(p, LR)),
    "momentum": (Momentum(momentum=0.8), lambda p: torch.optim.SGD(p, LR, momentum=0.8)),
    "nesterov": (Momentum(nesterov=True), lambda p: torch.optim.SGD(p, LR, momentum=0.9, nesterov=True)),
    "adam": (Adam(), lambda p: torch.optim.Adam(p, LR)),
    "adam without mean": (Adam(betas=(0.0, 0.99)), lambda p: torch.optim.Adam(p, LR, betas=(0.0, 0.99))),
}


def loss(p: Tensors) -> Tensor:
    return (p["a"] ** 4).sum() + (torch.sin(p["b"]) * p["a"].sum()).sum()


def start() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(n, generator=generator, dtype=torch.float64) for k, n in (("a", 3), ("b", 4))}


def walked(optimizer: InnerOptimizer, params: Tensors, learned: Tensors, lr: float | Tensor = LR) -> Tensors:
    moments = optimizer.start(params)
    for k in range(STEPS):
        direction, moments = optimizer.direction(grad(loss)(params), moments, k, learned)
        params = {name: value - lr * direction[name] for name, value in params.items()}
    return params


def values(optimizer: InnerOptimizer) -> Tensors:
    return {k: torch.tensor(v, dtype=torch.float64) for k, v in optimizer.hyperparameters().items()}


@pytest.mark.parametrize("name", PAIRS)
def test_steps_are_those_of_torch(name: str) -> None:
    ours, theirs = PAIRS[name]
    held = {k: v.clone().requires_grad_() for k, v in start().items()}
    optimizer = theirs(list(held.values()))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(held).backward()
        optimizer.step()
    for k, v in walked(ours, start(), {}).items():
        torch.testing.assert_close(v, held[k].detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_what_is_learned_starts_where_the_options_say(kind: str) -> None:
    fixed, learned = make_optimizer(kind), make_optimizer(kind, learned=True)
    after, same = walked(fixed, start(), {}), walked(learned, start(), values(learned))
    for k in after:
        torch.testing.assert_close(same[k], after[k], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("optimizer", [Momentum(learned=True), Adam(betas=(0.6, 0.9), learned=True)])
def test_every_hyper_parameter_has_its_slope(optimizer: InnerOptimizer) -> None:
    learned = values(optimizer)

    def end(learned: Tensors) -> Tensor:
        return loss(walked(optimizer, start(), learned))

    slopes = grad(end)(learned)
    assert len(slopes) == len(optimizer.fractions()) > 0
    for name, slope in slopes.items():
        up, down = (end({**learned, name: learned[name] + e}) for e in (1e-6, -1e-6))
        assert float(up - down) / 2e-6 == pytest.approx(float(slope), rel=1e-5) and float(slope) != 0


def test_adam_is_differentiable_where_a_gradient_is_nought() -> None:
    """The gradient of a unit that a ReLU silences is exactly 0, where the root of its square has no slope."""

    def silent(p: Tensors) -> Tensor:
        return (torch.relu(-1 - p["a"] ** 2) * p["b"]).sum() + (p["b"] ** 2).sum()

    def end(p: Tensors) -> Tensor:
        optimizer, moments = Adam(), Adam().start(p)
        for k in range(2):
            direction, moments = optimizer.direction(grad(silent)(p), moments, k, {})
            p = {name: value - LR * direction[name] for name, value in p.items()}
        return (p["a"] + p["b"]).sum()

    slope = grad(end)({"a": torch.ones(3), "b": torch.ones(3)})
    assert torch.equal(slope["a"], torch.ones(3)) and torch.isfinite(slope["b"]).all()


@pytest.mark.parametrize(
    "kind, options, word",
    [
        ("momentum", {"momentum": 1.0}, "momentum"),
        ("adam", {"betas": (0.9, -0.1)}, "beta2"),
        ("adam", {"betas": (0.0, 0.9), "learned": True}, "cannot be learned"),
        ("adam", {"eps": 0.0}, "eps"),
    ],
)
def test_bad_options_are_refused_by_name(kind: str, options: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make_optimizer(kind, **options)
