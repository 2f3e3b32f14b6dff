"""What an evaluation is summed up as."""

from __future__ import annotations

import numpy as np
import pytest

from metadist.algorithms.base import PRE, STEP
from metadist.evaluation import summarise


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
