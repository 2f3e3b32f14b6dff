"""What is frozen stays to the bit, in one server and in shards, and the rest moves as if it were not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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
