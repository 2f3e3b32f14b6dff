"""Networks of other kinds than ours train by the strategy that suits them, with the plain loop's gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from metadist.algorithms import MAML, resolve_objective
from metadist.algorithms.base import TaskResults
from metadist.episode import EpisodeBatch, Examples
from metadist.inner import Engine, FunctionalModel, choose_strategy
from metadist.inner.engine import Strategy, drew_numbers
from metadist.models import ResNet12


class Transformer(nn.Module):
    """Reads the rows of a picture as words."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Linear(16, 8)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True), 1, enable_nested_tensor=False
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.words(x[:, 0])).mean(1))


class Forked(nn.Module):
    """Takes another way for bright pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.bright, self.dark = nn.Linear(256, 3), nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.bright if x.mean() > 0 else self.dark)(x.flatten(1))


def running_statistics() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


def batch(tasks: int = 2) -> EpisodeBatch:
    g = torch.Generator().manual_seed(0)

    def examples(n: int) -> Examples:
        x = torch.randn(tasks, 3 * n, 1, 16, 16, generator=g, dtype=torch.float64)
        bright_or_dark = torch.tensor([1.0, -1.0] * (tasks // 2)).view(-1, 1, 1, 1, 1)
        return Examples(x + bright_or_dark, torch.arange(3).repeat(tasks, n))

    return EpisodeBatch(examples(1), examples(2))


def learn(module: nn.Module, engine: Engine, kernels: bool) -> TaskResults:
    model = FunctionalModel(
        module, dtype=torch.float64, convolution="winograd" if kernels else "direct", fused_norm=kernels
    )
    learner = MAML(inner_lr=0.05, inner_steps=2).bind(model, resolve_objective("auto", batch().query.y[0]), engine)
    return learner.meta_gradient(learner.initial_meta_params(), batch())


@pytest.mark.parametrize(
    ("make", "strategies"),
    [
        (lambda: ResNet12(1, 3, widths=(8,)), {("vectorised", True)}),
        (Transformer, {("vectorised", True)}),
        (running_statistics, {("vectorised", True)}),
        (lambda: Transformer(dropout=0.3), {("loop", False)}),
        (Forked, {("adjoint", False), ("loop", False)}),
    ],
    ids=["resnet12", "transformer", "running statistics", "dropout", "control flow"],
)
def test_the_right_strategy_gives_the_gradient_of_the_loop(make: Callable[[], nn.Module], strategies) -> None:
    torch.manual_seed(1)
    module = make()
    module(torch.randn(2, 1, 16, 16))  # for lazy layers
    model = FunctionalModel(module, dtype=torch.float64)
    probed: dict[tuple[str, bool], TaskResults] = {}

    def probe(engine: Engine) -> bool:
        def call() -> None:
            probed[engine.strategy, bool(engine.compile)] = learn(module, engine, kernels=True)

        return drew_numbers(call)

    strategy, traced, reason = choose_strategy(model, probe, traced=True)
    assert (strategy, traced) in strategies, reason
    assert bool(reason) == (strategy != "vectorised")
    torch.manual_seed(3)
    wanted = learn(module, Engine("loop"), kernels=False)
    torch.manual_seed(3)
    made = probed.get((strategy, traced)) or learn(module, Engine(strategy), kernels=True)
    for name, value in wanted.gradient.items():
        torch.testing.assert_close(made.gradient[name], value, rtol=1e-8, atol=1e-10)
    for name, value in wanted.metrics.items():
        torch.testing.assert_close(made.metrics[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("strategy", ["vectorised", "adjoint", "loop"])
def test_dropout_is_for_learning_alone(strategy: Strategy) -> None:
    torch.manual_seed(1)
    module, without = Transformer(dropout=0.5), Transformer()
    without.load_state_dict(module.state_dict())
    found = {}
    for name, made in (("with", module), ("without", without)):
        model = FunctionalModel(made, dtype=torch.float64)
        learner = MAML(inner_lr=0.05, inner_steps=2)
        learner.bind(model, resolve_objective("auto", batch().query.y[0]), Engine(strategy))
        meta_params = learner.initial_meta_params()
        if strategy == "loop":
            learned = [learner.meta_gradient(meta_params, batch()).metrics["loss"] for _ in range(2)]
            assert torch.equal(*learned) == (name == "without")
        found[name] = learner.evaluate(meta_params, batch())["loss"]
    assert torch.equal(found["with"], found["without"])


def test_resnet12_has_the_layers_of_the_paper() -> None:
    module = ResNet12(3, 5)
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    widths = [m.out_channels for m in convolutions if m.kernel_size == (3, 3)]
    assert widths == [64] * 3 + [160] * 3 + [320] * 3 + [640] * 3
    assert module.eval()(torch.randn(2, 3, 84, 84)).shape == (2, 5)
    assert ResNet12(3, None)(torch.randn(2, 3, 32, 32)).shape == (2, 640)
    # 12.4 million parameters in the body, as is reported for this network.
    assert abs(sum(p.numel() for p in module.blocks.parameters()) - 12.42e6) < 0.05e6
