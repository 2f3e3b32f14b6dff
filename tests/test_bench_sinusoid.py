"""The sinusoid benchmark runs at a tiny size, and compares like with like."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import ROOT

SCRIPT = ROOT / "tools" / "bench" / "sinusoid.py"
RESULTS = ROOT / "tools" / "bench" / "results"


def bench(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], cwd=cwd, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which it ran for 20 updates, from outside the repository."""
    path = tmp_path_factory.mktemp("bench")
    done = bench("--steps", "20", "--waves", "8", "--json", "out/sines.json", "--runs", "runs", cwd=path)
    assert done.returncode == 0, done.stderr
    (path / "stdout").write_text(done.stdout)
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"]


def check_rows(found: list[dict[str, Any]], waves: int) -> None:
    keys = {(r["learner"], r["support_points"], r["gradient_steps"]) for r in found}
    wanted = {(n, p, k) for n in ("maml", "pretrained", "oracle") for p in (5, 10, 20) for k in range(11)}
    assert keys == wanted and len(found) == len(wanted)
    for row in found:
        assert row["waves"] == waves
        assert np.isfinite([row["mean_squared_error"], row["ci95"], row["median_squared_error"]]).all()
        assert (row["mean_squared_error"] == 0) == (row["learner"] == "oracle")
        assert (row["step_size"] is None) == (row["learner"] == "oracle" or row["gradient_steps"] == 0)


@pytest.mark.slow
def test_it_writes_rows_a_picture_and_a_table(tiny: Path) -> None:
    check_rows(rows(tiny / "out" / "sines.json"), 8)
    setup = json.loads((tiny / "out" / "sines.json").read_text())["setup"]
    assert setup["updates"] == 20 and setup["cpu_cores"] >= 1 and len(setup["date"]) == 10
    with Image.open(tiny / "out" / "sines.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    table = (tiny / "stdout").read_text().splitlines()
    assert table[0] == "| learner | points | after 0 steps | after 1 step | after 10 steps |" and len(table) == 11


def test_both_learners_train_on_the_same_tasks_from_the_same_start(tiny: Path) -> None:
    configs, first = {}, {}
    for name in ("maml", "pretrained"):
        configs[name] = yaml.safe_load((tiny / "runs" / name / "config.yaml").read_text())
        first[name] = json.loads((tiny / "runs" / name / "metrics.jsonl").read_text().splitlines()[0])
    assert configs["pretrained"]["algorithm"]["import_path"] == "tools.examples.pretrained:PretrainedOnAll"
    for section in ("seed", "tasks", "model", "outer", "engine"):
        assert configs["maml"][section] == configs["pretrained"][section], section
    # The network before its first update, judged on the first meta-batch.
    assert first["maml"]["pre_adaptation_loss"] == first["pretrained"]["pre_adaptation_loss"]
    assert first["maml"]["loss"] != first["pretrained"]["loss"] == first["pretrained"]["pre_adaptation_loss"]


def test_one_step_of_the_benchmark_is_the_librarys_own_adaptation(tiny: Path) -> None:
    """What the benchmark measures after a step is what the learner does in use."""
    import metadist as md

    learner = md.load(tiny / "runs" / "maml")
    batch = md.SinusoidTasks(shots=10, query_shots=100).episodes(0, "test", range(8))
    loss = learner.algorithm.evaluate(learner.meta_params, batch)["loss"].double()
    (row,) = [
        r for r in rows(tiny / "out" / "sines.json")
        if (r["learner"], r["support_points"], r["gradient_steps"]) == ("maml", 10, 1)
    ]  # fmt: skip
    assert row["mean_squared_error"] == pytest.approx(float(loss.mean()), rel=1e-5)


def test_finished_runs_of_another_length_are_refused(tiny: Path) -> None:
    done = bench("--steps", "21", "--waves", "8", "--runs", "runs", cwd=tiny)
    assert done.returncode != 0 and "was trained for 20 updates, not 21" in done.stderr


def test_it_explains_itself_with_an_example(tmp_path: Path) -> None:
    done = bench("--help", cwd=tmp_path)
    assert done.returncode == 0 and "--quick" in done.stdout and "--steps" not in done.stdout
    assert "python tools/bench/sinusoid.py --quick --json" in done.stdout


def test_the_kept_result_shows_what_the_readme_says() -> None:
    found = rows(RESULTS / "sinusoid.json")
    check_rows(found, 600)
    by = {(r["learner"], r["support_points"], r["gradient_steps"]): r for r in found}
    readme = (ROOT / "README.md").read_text()
    for points in (5, 10, 20):
        for steps in (1, 10):
            better, worse = (by[name, points, steps] for name in ("maml", "pretrained"))
            assert better["mean_squared_error"] + better["ci95"] < worse["mean_squared_error"] - worse["ci95"]
            for r in (better, worse):
                assert f"{r['mean_squared_error']:.3f} ± {r['ci95']:.3f}" in readme
    text = (RESULTS / "sinusoid.json").read_text()
    assert "/" not in text.replace("\\/", ""), "no paths of the machine it was measured on"
