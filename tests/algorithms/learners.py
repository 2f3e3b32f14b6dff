"""Every listed learner with a task that is small enough to check it on: what a new one adds to get its tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from metadist.algorithms import BUILT_IN, Algorithm, Plan, resolve_objective
from metadist.episode import Episode, EpisodeBatch, Examples
from metadist.inner import Engine, FunctionalModel
from metadist.inner.engine import Strategy
from metadist.inner.optimizers import make_optimizer
from metadist.inner.program import Compile
from metadist.models import MLP, Flatten
from metadist.tasks.sequences import arrange


@dataclass(frozen=True)
class Case:
    """A learner as the suite runs it.

    Args:
        type: its name in a config.
        options: hyper-parameters, as few steps as show something.
        tasks: ``regression``, ``classes`` or ``sequence``.
        model: of the config.
        exact: whether its meta-gradient is the derivative of its mean query loss.
        refused: hyper-parameters it must not take, with a word of what it says.
        learns: outer options under which its loss falls within 40 updates.
    """

    type: str
    options: dict[str, Any] = field(default_factory=dict)
    tasks: str = "classes"
    model: str = "mlp"
    exact: bool = True
    refused: dict[str, Any] = field(default_factory=dict)
    learns: dict[str, Any] = field(default_factory=dict)


INNER = {"inner_lr": 0.1, "inner_steps": 2}
CELL = {"controller_size": 12, "memory_slots": 8, "memory_width": 5, "read_heads": 2}
ADAM = {"type": "adam", "eps": 1e-4}
SLOWLY = {"lr": 0.01, "steps": 150}

CASES: dict[str, Case] = {
    "maml": Case("maml", INNER, refused={"inner_lr": 0.0}),
    "maml first order": Case("maml", {**INNER, "first_order": True}, exact=False),
    "maml sgd learned": Case("maml", {**INNER, "inner_optimizer": {"type": "sgd", "learned": True}}),
    "maml adam learned": Case(
        "maml", {**INNER, "inner_steps": 3, "inner_optimizer": {**ADAM, "betas": [0.5, 0.9], "learned": True}},
        refused={"inner_optimizer": {"type": "adam", "betas": [0.0, 0.9], "learned": True}}),
    "anil": Case("anil", INNER, refused={"head": "nowhere"}),
    "boil": Case("boil", INNER, refused={"inner_steps": 0}),
    "meta_sgd": Case("meta_sgd", INNER, refused={"inner_lr": -1.0}),
    "meta_sgd momentum learned": Case(
        "meta_sgd", {**INNER, "inner_steps": 3,
                     "inner_optimizer": {"type": "momentum", "nesterov": True, "learned": True}},
        refused={"inner_optimizer": {"type": "momentum", "momentum": 1.0}}),
    "mamlpp": Case("mamlpp", {**INNER, "multi_step_loss_updates": 0}, refused={"multi_step_loss_updates": -1}),
    "mamlpp running": Case("mamlpp", {**INNER, "multi_step_loss_updates": 0}, model="normed"),
    "cavia": Case("cavia", {"inner_lr": 0.5, "inner_steps": 2, "context_size": 3}, refused={"modulation": "bend"}),
    "cavia film": Case("cavia", {"inner_lr": 0.5, "context_size": 3, "modulation": "film"}),
    "reptile": Case("reptile", {**INNER, "inner_steps": 4, "inner_batch_size": 3}, exact=False,
                    refused={"inner_batch_size": 0}),
    "reptile adam": Case(
        "reptile", {"inner_lr": 0.1, "inner_steps": 6, "inner_optimizer": {**ADAM, "betas": [0.0, 0.9]}}, exact=False,
        refused={"inner_optimizer": {"type": "sgd", "learned": True}}),
    "imaml": Case("imaml", {**INNER, "cg_steps": 3}, exact=False, refused={"proximity": 0.0}),
    "imaml momentum": Case(
        "imaml", {**INNER, "cg_steps": 3, "inner_optimizer": {"type": "momentum", "momentum": 0.3}}, exact=False,
        refused={"inner_optimizer": {"type": "adam", "learned": True}}),
    "protomaml": Case("protomaml", INNER, refused={"head": "layers.1"}),
    "protonet": Case("protonet", refused={"distance": "manhattan"}),
    "protonet cosine": Case("protonet", {"distance": "cosine"}),
    "matchingnet": Case("matchingnet", refused={"sharpness": 0.0}),
    "matchingnet full context": Case("matchingnet", {"full_context": True, "reads": 2}, refused={"reads": 0}),
    "es": Case("es", {**INNER, "pairs": 4}, exact=False, refused={"sigma": 0.0}, learns={"steps": 120, "lr": 0.03}),
    "pes": Case("pes", {**INNER, "pairs": 4, "horizon": 6}, exact=False, refused={"horizon": 5}),
    "pes fixed rate": Case("pes", {**INNER, "pairs": 4, "horizon": 4, "learned_rate": False}, exact=False,
                           refused={"pairs": 0}, learns={"steps": 120, "lr": 0.03}),
    "mann": Case("mann", CELL, "sequence", exact=False, refused={"usage_decay": 1.5}),
    "mann feedforward": Case("mann", {**CELL, "controller": "feedforward"}, "sequence", exact=False, learns=SLOWLY,
                             refused={"controller": "gru"}),
    "mann without memory": Case("mann", {**CELL, "memory": "none"}, "sequence", exact=False,
                                refused={"memory": "ntm"}),
    "snail": Case("snail", {"filters": 6, "attention_size": 4}, "sequence", refused={"filters": 0}),
}  # fmt: skip

WAYS, SHOTS, QUERY, FEATURES = 3, 2, 2, 4


def episodes(tasks: int, seed: int = 0, kind: str = "classes") -> EpisodeBatch:
    """Small tasks in float64: noisy clusters to tell apart, whose centres are the task.

    Of kind ``sequence`` their examples come in a random order, support and query mixed.
    """
    generator = torch.Generator().manual_seed(seed)

    def one() -> Episode:
        centres = torch.randn(WAYS, FEATURES, generator=generator, dtype=torch.float64)

        def draw(n: int) -> Examples:
            y = torch.arange(WAYS).repeat(n)
            noise = torch.randn(WAYS * n, FEATURES, generator=generator, dtype=torch.float64)
            return Examples(centres[y] + 0.3 * noise, y)

        return Episode(draw(SHOTS), draw(QUERY))

    batch = EpisodeBatch.stack([one() for _ in range(tasks)])
    return arrange(batch, [(seed, kind, e) for e in range(tasks)], "shuffled" if kind == "sequence" else "by_class",
                   "index")  # fmt: skip


class Normed(nn.Module):
    """A network with BatchNorm."""

    def __init__(self, out: int | None) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(FEATURES, 6), nn.BatchNorm1d(6)
        self.last = nn.Identity() if out is None else nn.Linear(6, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


class Smooth(nn.Module):
    """A network that is differentiable everywhere, for finite differences."""

    def __init__(self, out: int | None) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 6)
        self.last = nn.Identity() if out is None else nn.Linear(6, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


MODULES: dict[str, Callable[[int | None], nn.Module]] = {
    "mlp": lambda out: MLP(FEATURES, out, (6,)),
    "smooth": Smooth,
    "normed": Normed,
    "flatten": lambda out: Flatten(),
}

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"type": "mlp", "hidden": [6]},
    "flatten": {"type": "flatten", "size": 6},
    "normed": {"type": "conv4", "filters": 4, "batchnorm": "running"},
}
"""The same in a config."""


def learner_of(
    case: Case, strategy: Strategy = "vectorised", model: str | None = None, batchnorm: str = "transductive",
    device: str = "cpu", compile: Compile = False,
) -> Algorithm:  # fmt: skip
    """The learner bound to its model, in float64, as :class:`metadist.experiment.Experiment` does it."""
    torch.manual_seed(3)
    options = dict(case.options)
    if "inner_optimizer" in options:
        options["inner_optimizer"] = make_optimizer(**options["inner_optimizer"])
    algorithm = BUILT_IN[case.type](**options)
    algorithm.plan = Plan(8, 8)
    example = episodes(1, kind=case.tasks)[0]
    example = Episode(*(Examples(s.x.float(), s.y) for s in (example.support, example.query)))
    module = MODULES[model or case.model](WAYS if algorithm.wants == "outputs" else None)
    module = algorithm.prepare(module, example)
    functional = FunctionalModel(module, device, torch.float64, batchnorm)  # type: ignore[arg-type]
    objective = resolve_objective(algorithm.loss, example.query.y, algorithm.metric)
    return algorithm.bind(functional, objective, Engine(strategy, compile))
