"""The shipped sweeps: well-formed, and run by the command that an agent of W&B builds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps import utils as agent

from metadist.config import load_config
from metadist.tracking.wandb_file import offline_runs, read_offline_run
from tests.conftest import ROOT

SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
SMALL = ["runtime.type=local", "outer.steps=2", "outer.meta_batch_size=4", "evaluation.episodes=2", "model.filters=8",
         "evaluation.every=1", "evaluation.validation_episodes=2", "engine.compile=false"]  # fmt: skip


def _sweep(path: Path) -> dict[str, Any]:
    found = agent.load_sweep_config(str(path))
    assert found is not None
    return found


def _sampled(sweep: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """One point of the space, as the server hands it to an agent."""
    return {name: {"value": (p.get("values") or [p.get("max")])[0]} for name, p in sweep["parameters"].items()}


def _command(sweep: dict[str, Any]) -> list[str]:
    """What an agent runs for a sampled point, by the client's own functions."""
    words = agent.create_sweep_command(sweep["command"])
    values = agent.create_sweep_command_args({"args": _sampled(sweep)})
    values["env"] = ["/usr/bin/env"]
    return [word for w in map(str, words) for word in (values[w[2:-1]] if w.startswith("${") else [w])]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_it_has_a_header_and_a_space_within_the_config(path: Path) -> None:
    sweep = _sweep(path)
    assert path.read_text().startswith("# ") and sweep["name"] == path.stem
    assert sweep["method"] in ("grid", "random", "bayes") and sweep["metric"]["goal"] in ("minimize", "maximize")
    assert all(set(p) in ({"values"}, {"distribution", "min", "max"}) for p in sweep["parameters"].values())
    assert sweep["method"] != "grid" or all("values" in p for p in sweep["parameters"].values())
    config, *overrides = _command(sweep)[3:]
    assert load_config(ROOT / config, tuple(overrides)), "a word of the space is not one of the config"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_it_is_of_the_schema_of_wandb(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    spec = importlib.util.find_spec("sweeps")
    if spec is None or spec.origin is None:
        pytest.skip("the schema comes with `pip install wandb[sweeps]`")
    schema = json.loads((Path(spec.origin).parent / "config" / "schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(yaml.safe_load(path.read_text()))


@pytest.mark.slow
def test_the_command_of_an_agent_runs_and_the_run_is_the_one_it_announced(tmp_path: Path) -> None:
    sweep = _sweep(ROOT / "configs" / "sweeps" / "glyphs_rates.yaml")
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text(yaml.safe_dump({"wandb_version": 1, **_sampled(sweep)}))
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("WANDB")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "offline", "WANDB_SWEEP_ID": "sweep001", "WANDB_RUN_ID": "announced",
        "WANDB_PROJECT": "searches", "WANDB_SWEEP_PARAM_PATH": str(parameters),
    }  # fmt: skip
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = subprocess.run([*_command(sweep), *SMALL], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wandb: " not in done.stderr, "the client complains"
    (run_dir,) = (tmp_path / "runs").iterdir()
    (file,) = offline_runs(run_dir)
    run = read_offline_run(file)
    assert (run["run_id"], run["sweep_id"], run["project"]) == ("announced", "sweep001", "searches")
    assert run["name"] == run_dir.name, "runs of one sweep could not be told apart"
    assert run["config"]["outer"]["lr"] == sweep["parameters"]["outer.lr"]["max"]
    assert any(sweep["metric"]["name"] in row for row in run["history"]), "the metric of the sweep is not told"
    assert json.loads((run_dir / "summary.json").read_text())["wandb_run"] == "announced"
