"""What an evaluation is summed up as."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from metadist.algorithms.base import PRE, STEP
from metadist.cli import main
from metadist.evaluation import summarise
from tests.conftest import ROOT


def test_the_adaptation_curve_begins_before_the_first_step_and_ends_at_the_result() -> None:
    of = {PRE: 0.2, f"{STEP}1/": 0.5, f"{STEP}2/": 0.7, "": 0.9}
    metrics = {place + name: np.array([v, v + 0.02]) for place, v in of.items() for name in ("loss", "accuracy")}
    found = summarise(metrics, "accuracy", "test", "none")
    assert found["mean"] == pytest.approx(0.91)
    curve = {k: v["accuracy"] for k, v in found["by_step"].items()}
    assert curve == pytest.approx({"0": 0.21, "1": 0.51, "2": 0.71, "3": 0.91}) and list(curve) == ["0", "1", "2", "3"]
    assert set(found["by_step"]["0"]) == {"loss", "accuracy"}


def test_without_steps_there_is_no_curve() -> None:
    assert "by_step" not in summarise({"loss": np.ones(2), PRE + "loss": np.ones(2)}, "loss", "test", "none")


def test_a_run_that_is_judged_on_one_episode_has_no_interval_and_ends_well(tmp_path: Path) -> None:
    words = [
        "train", str(ROOT / "configs" / "sinusoid_maml.yaml"), "outer.steps=2", "outer.meta_batch_size=2",
        "outer.tasks_per_microbatch=2", "engine.compile=false", "evaluation.episodes=1", "evaluation.every=1",
        "evaluation.validation_episodes=1", "tracking.wandb.mode=disabled", "--run-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["evaluation"]
    assert found["episodes"] == 1 and found["ci95"] is None and found["mean"] > 0
    assert (tmp_path / "run" / "report.html").exists()
    judged = CliRunner().invoke(main, ["evaluate", str(tmp_path / "run")], catch_exceptions=False)
    assert judged.exit_code == 0 and "nan" not in done.output + judged.output, judged.output
