"""The meta-gradient of MAML in float64: closed form, finite differences, and one answer from every strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metadist.algorithms import MAML, Algorithm, TaskResults, resolve_objective
from metadist.episode import EpisodeBatch, Examples
from metadist.inner import Engine, FunctionalModel, Tensors, choose_strategy, gradients
from metadist.inner.engine import Strategy, drew_numbers
from metadist.models import MLP, Conv4

STRATEGIES: tuple[Strategy, ...] = ("vectorised", "adjoint", "loop")
LR = 0.1


class Normed(nn.Module):
    """A user's module: one weight used twice, LayerNorm, and no ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.out = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(torch.tanh(self.norm(self.mix(x)))))


class Forked(nn.Module):
    """Its path depends on its data, which vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) if x.sum() > 0 else self.b(x) ** 2


class FunctionalDropout(nn.Module):
    """Dropout that no nn.Dropout in the module tree tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.dropout(x, 0.5, training=self.training))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv4 stride": (lambda: Conv4(1, 5, filters=4), (1, 16, 16)),
    "conv4 max_pool": (lambda: Conv4(1, 5, filters=4, downsample="max_pool", image_size=(16, 16)), (1, 16, 16)),
    "mlp": (lambda: MLP(6, 5, (8, 7)), (6,)),
    "user": (Normed, (6,)),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(5)


def classes(shape: tuple[int, ...], tasks: int = 3, ways: int = 3, shots: int = 1, query: int = 2) -> EpisodeBatch:
    def examples(n: int) -> Examples:
        return Examples(torch.randn(tasks, ways * n, *shape).double(), torch.arange(ways).repeat(tasks, n))

    return EpisodeBatch(examples(shots), examples(query))


def maml(module: nn.Module, batch: EpisodeBatch, strategy: Strategy = "vectorised", **options: Any) -> MAML:
    algorithm = MAML(inner_lr=LR, **options)
    objective = resolve_objective(algorithm.loss, batch.query.y[0])
    algorithm.bind(FunctionalModel(module, dtype=torch.float64), objective, Engine(strategy))
    return algorithm


def results(module: nn.Module, batch: EpisodeBatch, strategy: Strategy = "vectorised", **options: Any) -> TaskResults:
    learner = maml(module, batch, strategy, **options)
    return learner.meta_gradient(learner.initial_meta_params(), batch)


def reference_loss(module: nn.Module, params: Tensors, batch: EpisodeBatch, steps: int) -> Tensor:
    """The summed query loss after adaptation, written as the paper has it, on a module of plain autograd."""
    total = torch.zeros((), dtype=torch.float64)
    for episode in batch:
        fast = {k: p.detach() * 1 + (p - p.detach()) for k, p in params.items()}
        for _ in range(steps):
            fast = {k: p if p.requires_grad else p.requires_grad_() for k, p in fast.items()}
            loss = F.cross_entropy(functional_call(module, fast, (episode.support.x,)), episode.support.y)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True, materialize_grads=True)
            fast = {k: p - LR * g for (k, p), g in zip(fast.items(), grads, strict=True)}
        total = total + F.cross_entropy(functional_call(module, fast, (episode.query.x,)), episode.query.y)
    return total


def reference_gradient(module: nn.Module, batch: EpisodeBatch, steps: int) -> Tensors:
    params = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}
    grads = torch.autograd.grad(reference_loss(module, params, batch, steps), list(params.values()), allow_unused=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(params.items(), grads, strict=True)}


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def relative(a: Tensors, b: Tensors) -> float:
    assert a.keys() == b.keys()
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


# --------------------------------------------------------------------------- against the mathematics


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("steps", [1, 5])
def test_closed_form_on_a_quadratic(steps: int, strategy: Strategy) -> None:
    """Least squares: the query gradient at theta_K times (I - alpha H)^K, H of the support set."""
    x, y = torch.randn(3, 6, 4).double(), torch.randn(3, 6, 1).double()
    batch = EpisodeBatch(Examples(x, y), Examples(torch.randn(3, 5, 4).double(), torch.randn(3, 5, 1).double()))
    module = nn.Linear(4, 1, bias=False).double()
    start, wanted = module.weight.detach().numpy()[0], np.zeros(4)
    for episode in batch:
        (xs, ys), (xq, yq) = ((e.x.numpy(), e.y.numpy()[:, 0]) for e in (episode.support, episode.query))
        shrink, theta = np.eye(4) - LR * 2 / 6 * xs.T @ xs, start
        for _ in range(steps):
            theta = theta - LR * 2 / 6 * xs.T @ (xs @ theta - ys)
        wanted += np.linalg.matrix_power(shrink, steps) @ (2 / 5 * xq.T @ (xq @ theta - yq))
    got = results(module, batch, strategy, inner_steps=steps).gradient["weight"].numpy()[0]
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 1e-10


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", ["conv4 stride", "conv4 max_pool"])
def test_central_differences_of_conv4(name: str, steps: int) -> None:
    make, shape = MODELS[name]
    module, batch = make().double(), classes(shape, tasks=2, ways=5, query=1)
    gradient = results(module, batch, inner_steps=steps).gradient
    start, eps = {k: p.detach().clone() for k, p in module.named_parameters()}, 1e-6
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        along = {k: torch.randn(p.shape, generator=generator, dtype=torch.float64) for k, p in start.items()}
        along = {k: d / flat(along).norm() for k, d in along.items()}

        def at(t: float, along: Tensors = along) -> float:
            moved = {k: start[k] + t * along[k] for k in start}
            return float(reference_loss(module, moved, batch, steps).detach())

        difference, slope = (at(eps) - at(-eps)) / (2 * eps), float(flat(gradient) @ flat(along))
        assert abs(difference - slope) < 1e-6 * abs(slope)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_first_order_is_the_query_gradient_at_the_adapted_parameters(name: str, strategy: Strategy) -> None:
    make, shape = MODELS[name]
    module, batch = make().double(), classes(shape)
    learner = maml(module, batch, strategy, inner_steps=3, first_order=True)
    start = learner.initial_meta_params()
    wanted = {k: torch.zeros_like(p) for k, p in start.items()}
    for episode in batch:
        adapted = {k: p.detach().requires_grad_() for k, p in learner.adapt(start, episode.support).items()}
        loss = F.cross_entropy(functional_call(module, adapted, (episode.query.x,)), episode.query.y)
        for k, g in zip(adapted, torch.autograd.grad(loss, list(adapted.values())), strict=True):
            wanted[k] += g
    got = learner.meta_gradient(start, batch).gradient
    assert relative(got, wanted) < 1e-10
    assert relative(got, results(module, batch, strategy, inner_steps=3).gradient) > 1e-3


# --------------------------------------------------------------------------- one answer


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_strategies_agree(name: str, steps: int, first_order: bool) -> None:
    make, shape = MODELS[name]
    module, batch = make().double(), classes(shape)
    options = {"inner_steps": steps, "first_order": first_order}
    wanted = results(module, batch, "loop", **options)
    assert set(wanted.metrics) == {"loss", "accuracy", "pre_adaptation_loss", "pre_adaptation_accuracy"}
    for strategy in ("vectorised", "adjoint"):
        got = results(module, batch, strategy, **options)
        assert relative(got.gradient, wanted.gradient) < 1e-10
        assert got.metrics.keys() == wanted.metrics.keys()
        for k, values in wanted.metrics.items():
            assert values.shape == (3,)
            torch.testing.assert_close(got.metrics[k], values, rtol=1e-10, atol=1e-12)


class AdaptAlone(Algorithm):
    """What a user writes at the least."""

    def adapt(self, meta_params: Tensors, support: Examples, *, evaluation: bool = False) -> Tensors:
        for _ in range(2):
            fast = meta_params
            g = gradients(lambda p: self.objective.loss(self.model(p, support.x), support.y), fast)
            meta_params = {k: p - LR * g[k] for k, p in fast.items()}
        return meta_params


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_algorithm_with_adapt_alone_gets_the_exact_meta_gradient(strategy: Strategy) -> None:
    module, batch = Normed().double(), classes((6,))
    learner = AdaptAlone()
    learner.bind(FunctionalModel(module), resolve_objective("auto", batch.query.y[0]), Engine(strategy))
    got, wanted = learner.meta_gradient(learner.initial_meta_params(), batch), results(module, batch, inner_steps=2)
    assert relative(got.gradient, wanted.gradient) < 1e-10
    assert {k: v.tolist() for k, v in got.metrics.items()} == {
        k: pytest.approx(v.tolist(), rel=1e-10) for k, v in wanted.metrics.items()
    }


@pytest.mark.parametrize("name", ["conv4 stride", "mlp"])
def test_a_task_does_not_feel_its_neighbours(name: str) -> None:
    make, shape = MODELS[name]
    module, tasks = make().double(), list(classes(shape, tasks=5))
    learner = maml(module, EpisodeBatch.stack(tasks), inner_steps=2)
    start = learner.initial_meta_params()

    def run(*which: int) -> TaskResults:
        return learner.meta_gradient(start, EpisodeBatch.stack([tasks[i] for i in which]))

    alone, among = run(0), [run(0, 1, 2), run(0, 3, 4)]
    for r, others in zip(among, [run(1, 2), run(3, 4)], strict=True):
        own = {k: r.gradient[k] - others.gradient[k] for k in start}
        assert relative(own, alone.gradient) < 1e-12
        for k, values in alone.metrics.items():
            torch.testing.assert_close(r.metrics[k][:1], values, rtol=1e-12, atol=1e-12)
    assert relative(run(0, 0, 0).gradient, {k: 3 * g for k, g in alone.gradient.items()}) < 1e-12


# --------------------------------------------------------------------------- modules with habits


def strategy_of(module: nn.Module, batch: EpisodeBatch, steps: int, traced: bool = True) -> tuple[Strategy, bool, str]:
    learner = maml(module, batch, inner_steps=steps)
    params = learner.initial_meta_params()

    def probe(engine: Engine) -> bool:
        bound = learner.bind(learner.model, learner.objective, engine)
        return drew_numbers(lambda: bound.meta_gradient(params, batch))

    return choose_strategy(learner.model, probe, traced)


def test_running_statistics_are_neither_read_nor_kept() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    assert isinstance(module[1], nn.BatchNorm2d) and module[1].running_mean is not None
    module[1].running_mean.fill_(7.0)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    batch = classes((1, 6, 6))
    wanted = reference_gradient(module, batch, steps=2)  # training mode: the batch's own statistics
    assert not torch.equal(module[1].running_mean, before["1.running_mean"])
    module.load_state_dict(before)
    module.eval()
    for strategy in STRATEGIES:
        assert relative(results(module, batch, strategy, inner_steps=2).gradient, wanted) < 1e-10
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not module.training and module[1].track_running_stats
    assert strategy_of(module, batch, 2) == ("vectorised", True, "")
    assert strategy_of(module, batch, 2, traced=False) == ("vectorised", False, "")


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)), FunctionalDropout])
def test_dropout_is_left_to_the_loop(make: Callable[[], nn.Module]) -> None:
    """A recomputed step would draw another mask than the step it stands for."""
    module, batch = make().double(), classes((6,))
    strategy, traced, reason = strategy_of(module, batch, steps=3)
    assert strategy == "loop" and not traced and "random" in reason
    torch.manual_seed(9)
    wanted = reference_gradient(module, batch, steps=3)
    torch.manual_seed(9)
    assert relative(results(module, batch, strategy, inner_steps=3).gradient, wanted) < 1e-10


def test_control_flow_on_the_data_falls_back_to_the_right_gradient() -> None:
    module, batch = Forked().double(), classes((6,), tasks=6)
    taken = {bool(e.support.x.sum() > 0) for e in batch}
    assert taken == {True, False}, "the batch must send tasks both ways"
    strategy, traced, reason = strategy_of(module, batch, steps=2)
    assert strategy in ("adjoint", "loop") and not traced and reason
    got = results(module, batch, strategy, inner_steps=2).gradient
    assert relative(got, reference_gradient(module, batch, 2)) < 1e-10


def test_unknown_strategy_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="not 'fast'"):
        Engine("fast")  # type: ignore[arg-type]
