"""Every shipped config says what it is for, and runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from metadist.cli import main
from metadist.config import load_config
from metadist.config.load import read_yaml
from metadist.data import pack_arrays
from metadist.tasks.glyphs import glyph_images
from metadist.tracking.wandb_file import offline_runs, read_offline_run
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMALL = ["runtime.type=local", "outer.steps=2", "outer.meta_batch_size=2", "outer.tasks_per_microbatch=1",
         "evaluation.episodes=2", "evaluation.every=0", "engine.compile=false"]  # fmt: skip
ALONE = "tracking.wandb.mode=disabled"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for Omniglot: the embedded letters, of which there are enough for 20 ways."""
    images, names, splits = glyph_images()
    few = {split: [names[c] for c in classes[:30]] for split, classes in splits.items()}
    chosen = [c for split in few for c in splits[split][:30]]
    out = tmp_path_factory.mktemp("configs") / "shards"
    pack_arrays(images[chosen], [names[c] for c in chosen], few, out)
    return out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_it_has_a_header_and_its_own_name(path):
    assert path.read_text().startswith("# "), "wanted a comment on what it reproduces and what to expect"
    assert load_config(path).name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_it_runs_two_steps(path, shards, tmp_path):
    words = [*SMALL, ALONE, *([f"tasks.path={shards}"] if read_yaml(path)["tasks"]["type"] == "shards" else [])]
    run_dir = tmp_path / "run"
    result = CliRunner().invoke(main, ["train", str(path), *words, "--run-dir", str(run_dir)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["version"] for line in lines] == [1, 2]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["version"] == 2 and summary["evaluation"]["episodes"] == 2 and summary["tasks_seen"] == 4
    for name in ("config.yaml", "report.html", "learning_curve.png", "checkpoints/00000002/state.json"):
        assert (run_dir / name).stat().st_size > 0


METRICS = {
    "learning/loss", "learning/accuracy", "learning/pre_adaptation_loss", "learning/pre_adaptation_accuracy",
    "learning/grad_norm", "throughput/tasks_per_s", "time/data_wait_s", "time/server_s", "time/step_s", "workers/0_s",
}  # fmt: skip


def test_wandb_holds_the_run_and_a_resumed_run_continues_it(tmp_path):
    run_dir = tmp_path / "run"
    arguments = ["train", str(ROOT / "configs" / "glyphs_maml.yaml"), *SMALL, "--run-dir", str(run_dir)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert CliRunner().invoke(main, ["resume", str(run_dir), "outer.steps=4"]).exit_code == 0
    runs = [read_offline_run(path) for path in offline_runs(run_dir)]
    assert len(runs) == 2 and len({r["run_id"] for r in runs}) == 1
    assert json.loads((run_dir / "summary.json").read_text())["wandb_run"] == runs[0]["run_id"]
    steps = [row for r in runs for row in r["history"] if "learning/loss" in row]
    assert [row["outer_step"] for row in steps] == [1, 2, 3, 4]
    assert set(steps[-1]) >= METRICS
    pictures = [row for row in runs[0]["history"] if any("episodes" in k for k in row)]
    assert pictures, "the grid of episodes is missing"
    assert any("evaluation" in k for row in runs[1]["history"] for k in row)
    assert runs[0]["config"]["algorithm"]["type"] == "maml"
