"""What no inner loop changes gets one derivative for all tasks, where that is right, and none where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.algorithms import MAML, Algorithm, resolve_objective
from metadist.config import load_config
from metadist.episode import EpisodeBatch, Examples
from metadist.experiment import Experiment
from metadist.inner import Engine, FunctionalModel, adjoint
from metadist.inner.functional import Tensors
from tests.conftest import ROOT

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "leaky": F.leaky_relu, "elu": F.elu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "softplus": F.softplus, "softmax": lambda x: x.softmax(1),
}  # fmt: skip
LOSSES = {"cross entropy": F.cross_entropy, "mse": F.mse_loss, "smooth l1": F.smooth_l1_loss, "huber": F.huber_loss}


class Network(nn.Module):
    """A body, and a part that the inner loop changes: an activation and perhaps a norm between two layers."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.tanh, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.adapted, self.out = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, 3)
        self.activation, self.norm = activation, norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.norm(self.adapted(torch.tanh(self.body(x))))).mean((2, 3)))


class Words(nn.Module):
    """A table of vectors that the inner loop changes as well."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.adapted, self.out = nn.Embedding(40, 5), nn.Embedding(40, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.body(x) + self.adapted(x) ** 2).mean(1))


def batch(loss: Callable[..., Tensor] = F.cross_entropy, words: bool = False) -> EpisodeBatch:
    g = torch.Generator().manual_seed(0)

    def examples(n: int) -> Examples:
        x = torch.randint(0, 40, (3, n, 7), generator=g) if words else torch.randn(3, n, 1, 8, 8, generator=g).double()
        classes = loss is F.cross_entropy
        y = torch.randint(0, 3, (3, n), generator=g) if classes else torch.randn(3, n, 3, generator=g).double()
        return Examples(x, y)

    return EpisodeBatch(examples(5), examples(4))


def bound(module: nn.Module, strategy: Any, loss: Any = F.cross_entropy, first_order: bool = False) -> MAML:
    learner = MAML(0.3, 3, loss=loss, metric="mean_squared_error" if loss is not F.cross_entropy else "auto",
                   adapted=[f"{k}.*" for k, _ in module.named_children() if k != "body" and any(
                       True for _ in module.get_submodule(k).parameters())], first_order=first_order)  # fmt: skip
    y = batch(loss).query.y[0]
    learner.bind(FunctionalModel(module, dtype=torch.float64), resolve_objective(loss, y, "auto"), Engine(strategy))
    return learner


def both(make: Callable[[Any], Algorithm], tasks: EpisodeBatch) -> tuple[bool, float]:
    """Whether tasks are summed inside, and how far the gradient is from that of one task after the other."""
    together, alone = make("vectorised"), make("adjoint")
    meta_params = alone.initial_meta_params()
    found, wanted = (learner.meta_gradient(meta_params, tasks).gradient for learner in (together, alone))
    size = max(float(v.norm()) for v in wanted.values())  # a bias before a norm has no slope but rounding
    off = max(float((found[k] - v).norm()) for k, v in wanted.items()) / size
    (summed,) = together.engine._sums.values()
    return summed, off


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, first_order: bool) -> None:
    torch.manual_seed(2)
    module = Network(ACTIVATIONS[activation])
    summed, off = both(lambda s: bound(module, s, first_order=first_order), batch())
    assert summed and off < 1e-10


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: str) -> None:
    torch.manual_seed(2)
    module = Network()
    summed, off = both(lambda s: bound(module, s, LOSSES[loss]), batch(LOSSES[loss]))
    assert summed and off < 1e-10


def test_tables_of_vectors() -> None:
    torch.manual_seed(2)
    module = Words()
    summed, off = both(lambda s: bound(module, s), batch(words=True))
    assert summed and off < 1e-10


@pytest.mark.parametrize(
    ("norm", "may"),
    [(nn.BatchNorm2d(6), False), (nn.InstanceNorm2d(6, affine=True), False), (nn.LayerNorm([6, 4, 4]), False),
     (nn.GroupNorm(2, 6), True)],
)  # fmt: skip
def test_norms(norm: nn.Module, may: bool) -> None:
    torch.manual_seed(2)
    module = Network(norm=norm)
    summed, off = both(lambda s: bound(module, s), batch())
    assert (summed, off < 1e-10) == (may, True)


def test_torch_does_get_it_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails torch has been mended, and BatchNorm's derivative may be called sound."""
    monkeypatch.setattr(adjoint, "may_be_summed", lambda *_: True)
    torch.manual_seed(2)
    module = Network(norm=nn.BatchNorm2d(6))
    assert both(lambda s: bound(module, s), batch())[1] > 1e-5


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("convolution", ["winograd", "columns", "direct"])
@pytest.mark.parametrize(
    ("algorithm", "summed"),
    [
        ({"type": "protonet"}, (True, True)),
        ({"type": "anil", "inner_steps": 2}, (True, True)),
        ({"type": "maml", "adapted": ["head.*"], "inner_steps": 2}, (True, True)),
        ({"type": "maml", "adapted": ["*3*", "head.*"], "inner_steps": 2}, (True, False)),
        ({"type": "maml", "inner_steps": 2}, (False, False)),
    ],
    ids=["protonet", "anil", "head", "a block", "all"],
)
def test_the_kernels(algorithm: dict[str, Any], summed: tuple[bool, bool], convolution: str, fused: bool) -> None:
    words = [f"engine.convolution={convolution}", f"engine.fused_norm={str(fused).lower()}", "engine.precision=float64",
             "engine.compile=false", "model.filters=6", "outer.tasks_per_microbatch=2"]  # fmt: skip
    config = load_config(ROOT / "configs" / "glyphs_maml.yaml", words)

    def make(strategy: str) -> Algorithm:
        sections = config.model_dump()
        sections["algorithm"], sections["engine"]["strategy"] = algorithm, strategy
        return Experiment(type(config).model_validate(sections)).learner()

    inside, off = both(make, Experiment(config).first_tasks(2))
    assert (inside, off < 1e-9) == (summed[0 if fused else 1], True)


class Everything(Algorithm):
    """A learner of one's own, which takes gradients in its `adapt`."""

    loss, metric = "auto", "auto"

    def adapt(self, meta_params: Tensors, support: Examples, *, evaluation: bool = False) -> Tensors:
        from metadist.inner import gradients

        slope = gradients(lambda p: self.objective.loss(self.model(p, support.x), support.y), meta_params)
        return {k: v - 0.1 * slope[k] for k, v in meta_params.items()}


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d(6)])
def test_a_learner_of_ones_own(norm: nn.Module | None) -> None:
    torch.manual_seed(2)
    module = Network(norm=norm)

    def make(strategy: Any) -> Algorithm:
        model = FunctionalModel(module, dtype=torch.float64)
        return Everything().bind(model, resolve_objective("auto", batch().query.y[0]), Engine(strategy))

    assert both(make, batch())[1] < 1e-10
