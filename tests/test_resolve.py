"""The engine of a run: decided by rules, and within the memory that the config allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import nn

from metadist import resolve as resolve_module
from metadist.cli import main
from metadist.config import validate
from metadist.config.schema import LONG_RUN
from metadist.errors import ConfigError
from metadist.experiment import Experiment
from metadist.inner import Tensors
from metadist.inner.memory import peak_bytes
from metadist.resolve import predicted_memory, resolve

from .algorithms.learners import CASES
from .algorithms.test_runs import sections

STEPS, TASKS = 3, 4


def config(**engine: Any) -> dict[str, Any]:
    """Second order through several steps, of a network that is traced in a second."""
    return {
        "tasks": {"type": "glyphs", "ways": 3, "shots": 3},
        "model": {"type": "mlp", "hidden": [16]},
        "algorithm": {"type": "maml", "inner_steps": STEPS, "inner_lr": 0.1},
        "engine": {"precision": "float64", **engine},
        "outer": {"steps": 2, "meta_batch_size": TASKS, "tasks_per_microbatch": TASKS},
        "runtime": {"type": "local", "gpus_per_worker": 0},
        "evaluation": {"episodes": 4},
        "tracking": {"console": False, "wandb": {"mode": "disabled"}},
    }


def experiment(**engine: Any) -> Experiment:
    return Experiment(validate(config(strategy="vectorised", **engine)))


def gradient(experiment: Experiment) -> Tensors:
    learner = experiment.learner()
    return learner.meta_gradient(learner.initial_meta_params(), experiment.first_tasks(TASKS)).gradient


def measured(experiment: Experiment) -> int:
    learner, tasks = experiment.learner(), experiment.first_tasks(experiment.plan.tasks_per_microbatch)
    params = learner.initial_meta_params()
    learner.meta_gradient(params, tasks)  # what is traced is traced once
    return peak_bytes(lambda: learner.meta_gradient(params, tasks))


@pytest.mark.parametrize("name", CASES)
def test_the_memory_of_every_learner_is_foretold(name: str) -> None:
    made = Experiment(validate(sections(name)))
    assert predicted_memory(made) == measured(made) > 0


@pytest.mark.parametrize("recompute", [False, True])
def test_the_memory_of_what_is_traced_is_foretold(recompute: bool) -> None:
    made = experiment(recompute=recompute, tasks_together=3)
    assert predicted_memory(made) == measured(made) > 0


def test_a_budget_is_kept_by_the_same_gradient() -> None:
    whole = experiment()
    need = predicted_memory(whole)
    wanted = gradient(whole)
    settings = []
    for part in (1.0, 0.75, 0.5):
        decided = resolve(experiment(memory=int(part * need)))
        engine = decided.experiment.config.engine
        assert decided.memory is not None and decided.memory <= part * need
        assert measured(decided.experiment) <= part * need
        settings.append((engine.recompute, engine.tasks_together))
        for name, value in gradient(decided.experiment).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-11)
    assert settings == [(False, None), (True, 2), (True, 1)]
    # Once decided, it stays: a resumed run finds the same.
    assert resolve(decided.experiment).experiment.config == decided.experiment.config


def test_each_inner_step_adds_a_copy_of_the_parameters_where_steps_are_recomputed() -> None:
    def peak(steps: int) -> int:
        made = config(strategy="vectorised", recompute=True, compile=False)
        made["algorithm"]["inner_steps"] = steps
        return predicted_memory(Experiment(validate(made)))

    learner = experiment().learner()
    size = sum(v.numel() * v.itemsize for v in learner.initial_meta_params().values()) * TASKS
    assert (peak(10) - peak(2)) / 8 <= 1.2 * size


LONG = {"steps": LONG_RUN, "meta_batch_size": TASKS, "tasks_per_microbatch": TASKS}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "trace"),
        ({"outer": LONG}, True),
        ({"outer": LONG, "model": {"type": "conv4", "filters": 4}}, "trace"),
        ({"outer": LONG, "engine": "auto"}, True),
        ({"outer": LONG, "engine": {"compile": "trace"}}, "trace"),
        ({"outer": LONG, "engine": {"strategy": "adjoint"}}, False),
    ],
)
def test_inductor_is_left_to_long_runs_of_small_operators(
    changes: dict[str, Any], wanted: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(resolve_module, "compiler_missing", lambda: "")
    monkeypatch.setattr(resolve_module, "_not_compilable", lambda *given: tried.append(given) or "")
    decided = resolve(Experiment(validate(config(precision="float32") | changes)))
    engine = decided.experiment.config.engine
    assert (engine.compile if engine.strategy == "vectorised" else False) == wanted
    assert bool(tried) == (wanted is True and "compile" not in changes.get("engine", {}))
    assert resolve(decided.experiment).experiment.config == decided.experiment.config


@pytest.mark.parametrize("section", [{"compile": "auto"}, "auto"])
def test_a_clusters_driver_needs_no_gpu_of_its_own(section: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve_module, "compiler_missing", lambda: "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    made = config() | {"outer": LONG, "runtime": {"type": "ray", "gpus_per_worker": 1}, "engine": section}
    decided = resolve(Experiment(validate(made)))
    assert decided.experiment.config.engine.compile == "trace"
    assert "no GPU is here" in decided.reason and "engine.compile=true" in decided.reason
    asked = resolve(Experiment(validate(made | {"engine": {"compile": True}})))
    assert asked.experiment.config.engine.compile is True and not asked.reason


def test_auto_does_without_inductor_where_that_is_missing_or_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config() | {"outer": LONG}
    monkeypatch.setattr(resolve_module, "compiler_missing", lambda: "no C++ compiler was found")
    assert resolve(Experiment(validate(made))).experiment.config.engine.compile == "trace"

    def failing(*given: Any) -> Any:
        raise RuntimeError("no kernel for this\nand more")

    monkeypatch.setattr(resolve_module, "compiler_missing", lambda: "")
    monkeypatch.setattr("metadist.inner.program._compiled", failing)
    decided = resolve(Experiment(validate(made)))
    assert decided.experiment.config.engine.compile == "trace"
    assert decided.reason == "inductor cannot compile it: no kernel for this"
    assert capsys.readouterr().err.startswith("compiling the meta-gradient")


class Dropped(nn.Module):
    """Dropout that no module's type shows."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(784, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(nn.functional.dropout(x.flatten(1), 0.5, training=self.training))


class Forked(Dropped):
    """Looks at a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.out(x.flatten(1))
        return y if y.sum() > 0 else 2 * y


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "name, model",
    [
        ("maml", None), ("anil", None), pytest.param("mann", None, marks=pytest.mark.slow), ("maml", Dropped),
        ("maml", Forked),
    ],
)  # fmt: skip
def test_shapes_alone_tell_how_a_large_model_is_computed(
    name: str, model: Any, traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Experiment(validate(sections(name)), model=model)
    wanted = resolve_module._strategy(made, traced)
    monkeypatch.setattr(resolve_module, "LARGE", 0)
    if model is not Forked and name != "mann":  # what shapes do not tell is computed
        monkeypatch.setattr(resolve_module, "drew_numbers", None)
    assert resolve_module._strategy(made, traced) == wanted
    assert wanted[0] == {Dropped: "loop", Forked: "adjoint", None: "vectorised"}[model]


@pytest.mark.slow
def test_a_budget_that_nothing_keeps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine.memory: is 10\.0KB, but a task by itself takes .*raise it"):
        resolve(experiment(memory="10kB"))


@pytest.mark.parametrize("value", ["4XB", "-1GB", 0, "much"])
def test_a_budget_that_is_no_size_is_refused_by_name(value: object) -> None:
    with pytest.raises(ConfigError, match="engine.memory"):
        validate(config(memory=value))


def test_a_run_says_what_it_foretold_and_measured(tmp_path: Path) -> None:
    need = predicted_memory(experiment())
    wanted = {**config(memory=need * 3 // 4), "tracking": {"wandb": {"mode": "disabled"}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(wanted))
    done = CliRunner().invoke(main, ["train", str(tmp_path / "c.yaml"), "--run-dir", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "inner steps recomputed, 2 tasks at once" in done.output and "predicted of" in done.output
    memory = json.loads((tmp_path / "run" / "summary.json").read_text())["worker_memory"]
    assert 0 < memory["predicted"] <= need * 3 // 4 and memory["measured"] > 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["engine"]
    assert saved["recompute"] is True and saved["memory"] == need * 3 // 4
