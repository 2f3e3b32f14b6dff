"""What is frozen stays to the bit, in one server and in shards, and the rest moves as if it were not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from metadist.cli import main
from metadist.config import validate
from metadist.errors import ConfigError
from metadist.experiment import Experiment
from metadist.finished import load_learner
from metadist.outer.gradient import Layout
from metadist.outer.update import MetaUpdate
from metadist.server import outer_options
from metadist.training import train


def sections(**outer: Any) -> dict[str, Any]:
    return {
        "tasks": {"type": "sinusoid"}, "model": {"type": "mlp", "hidden": [6, 5]},
        "algorithm": {"type": "maml", "inner_steps": 2}, "engine": {"compile": False},
        "outer": {"lr": 1e-2, "steps": 3, "meta_batch_size": 4, "weight_decay": 0.1, "optimizer": "adamw", **outer},
        "runtime": {"type": "local"}, "evaluation": {"episodes": 2}, "tracking": {"wandb": {"mode": "disabled"}},
    }  # fmt: skip


def test_a_run_leaves_what_is_frozen_as_it_began(tmp_path: Path) -> None:
    frozen = ["layers.0.*", "layers.2.bias"]
    run = train(Experiment(validate(sections(frozen=frozen), "the test")), tmp_path / "run")
    learner, _, checkpoint = load_learner(run.path)
    begun = learner.initial_meta_params()
    same = {k for k, v in begun.items() if torch.equal(v, checkpoint.meta_params[k])}
    assert same == {"layers.0.weight", "layers.0.bias", "layers.2.bias"}


class NoWayBack(torch.autograd.Function):
    """The identity, of which nobody may take the slope."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a slope of what is frozen")


class Guarded(nn.Module):
    """A body that refuses to be learned, if ``guarded``, and a head."""

    guarded = True

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(1, 6), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.body(x))
        return self.head(NoWayBack.apply(y) if self.guarded else y)


@pytest.mark.parametrize("strategy", ["vectorised", "adjoint", "loop"])
@pytest.mark.parametrize("learner", [{"type": "maml", "adapted": ["head.*"], "inner_steps": 2}, {"type": "anil"}])
def test_nothing_is_computed_for_what_is_frozen(strategy: str, learner: dict[str, Any]) -> None:
    found = {}
    for frozen in ([], ["body.*"]):
        words = {**sections(frozen=frozen), "algorithm": learner, "engine": {"strategy": strategy, "compile": False}}
        words["model"] = {"type": "python", "name": "guarded"}
        experiment = Experiment(validate(words, "the test"), model=_make(guarded=bool(frozen)))
        bound, tasks = experiment.learner(), experiment.first_tasks(3)
        found[bool(frozen)] = bound.meta_gradient(bound.initial_meta_params(), tasks).gradient
    for name, value in found[False].items():
        same = torch.zeros_like(value) if name.startswith("body") else value
        torch.testing.assert_close(found[True][name], same, rtol=1e-6, atol=1e-8)


def test_what_is_frozen_and_adapted_has_its_slope() -> None:
    """Frozen is where the inner loop begins, not what it does."""
    found = []
    for frozen in ([], ["layers.*"]):
        experiment = Experiment(validate(sections(frozen=frozen), "the test"))
        bound = experiment.learner()
        found.append(bound.evaluate(bound.initial_meta_params(), experiment.first_tasks(3))["loss"])
    assert torch.equal(*found)


def _make(guarded: bool) -> Any:
    def make() -> nn.Module:
        module = Guarded()
        module.guarded = guarded
        return module

    return make


def test_the_rest_moves_as_if_the_frozen_were_not_there() -> None:
    sizes = [3, 4, 2]
    options = {**validate(sections(clip_norm=0.5), "the test").outer.model_dump(), "sizes": sizes}
    start, gradients = torch.randn(9), [torch.randn(9) for _ in range(3)]
    whole = MetaUpdate(start, options | {"rules": [(3, 7, {"kind": "keep", "rate": 1.0})]})
    alone = MetaUpdate(torch.cat([start[:3], start[7:]]), options | {"sizes": [3, 2]})
    for gradient in gradients:
        told, wanted = whole.apply(gradient, 2), alone.apply(torch.cat([gradient[:3], gradient[7:]]), 2)
        assert told["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-6), "no part of the norm"
    torch.testing.assert_close(torch.cat([whole.vector[:3], whole.vector[7:]]), alone.vector, rtol=1e-6, atol=1e-7)
    assert torch.equal(whole.vector[3:7], start[3:7])


def test_a_pattern_of_nothing_is_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = Experiment(validate(sections(frozen=["body.*"]), "the test"))
    learner = experiment.learner()
    with pytest.raises(ConfigError, match=r"outer.frozen: 'body.\*' is the name of nothing .*; there is lay"):
        outer_options(experiment, learner, Layout.of(learner.initial_meta_params()))
    (tmp_path / "c.yaml").write_text("{tasks: {type: sinusoid}, model: {type: mlp}, algorithm: {type: maml}}")
    words = ["train", str(tmp_path / "c.yaml"), "runtime.type=local", "outer.frozen=[nothing]"]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--run-dir", str(tmp_path / "run")])
    assert stopped.value.code == 2 and "outer.frozen: 'nothing'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
