"""The best of the evaluations during training is kept besides the newest, and can be asked for by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import metadist as md
from metadist.checkpoint import best_of
from metadist.cli import main
from metadist.loop import Training
from metadist.storage import FolderStore
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("no_pictures")
SHORT = [
    "outer.steps=8", "checkpoint.every=4", "checkpoint.keep=1", "evaluation.every=2", "evaluation.episodes=5",
    "evaluation.validation_episodes=5", "runtime.type=local", "tracking.console=false", "tracking.wandb.mode=disabled",
]  # fmt: skip


def metadist(*words: object, code: int = 0) -> str:
    told = CliRunner().invoke(main, list(map(str, words)))
    assert told.exit_code == code, (told.output, told.exc_info)
    return told.output


def test_the_best_is_kept_by_its_error_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors, original = {2: 0.9, 4: 0.5, 6: 0.3, 8: 0.4}, Training._evaluate

    def evaluate(self: Training, version: int, split: str, episodes: int) -> dict:
        return {**original(self, version, split, episodes), "mean": errors[version]}

    monkeypatch.setattr(Training, "_evaluate", evaluate)
    run_dir = tmp_path / "run"
    metadist("train", ROOT / "configs" / "sinusoid_maml.yaml", *SHORT, "--run-dir", run_dir)
    store = FolderStore(run_dir / "checkpoints")
    assert store.versions() == [6, 8] and best_of(store) == 6, "less error is better; between two checkpoints, too"
    best = json.loads((run_dir / "summary.json").read_text())["best"]
    assert (best["version"], best["mean"]) == (6, 0.3)
    monkeypatch.undo()
    for which, version in (("best", 6), ("latest", 8), ("8", 8)):
        assert json.loads(metadist("evaluate", run_dir, "--checkpoint", which, "--json"))["version"] == version
        assert md.load(run_dir, checkpoint=which).version == version
    assert "there are 6, 8, latest and best" in metadist("evaluate", run_dir, "--checkpoint", "7", code=1)
    assert "there are 6, 8, latest and best" in metadist("evaluate", run_dir, "--checkpoint", "bset", code=1)


def test_a_run_that_never_judged_itself_has_no_best(tmp_path: Path) -> None:
    words = [*SHORT, "evaluation.every=0", "outer.steps=2"]
    metadist("train", ROOT / "configs" / "sinusoid_maml.yaml", *words, "--run-dir", tmp_path / "run")
    told = metadist("evaluate", tmp_path / "run", "--checkpoint", "best", code=1)
    assert "holds no best checkpoint" in told and "evaluation.every" in told


@pytest.mark.slow
def test_what_was_lost_is_counted_though_the_checkpoints_know_nothing_of_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    metadist("train", ROOT / "configs" / "sinusoid_maml.yaml", *SHORT, "checkpoint.keep=9", "--run-dir", run_dir)
    for times in (1, 2, 3):
        for version in (4, 8):
            shutil.rmtree(run_dir / "checkpoints" / f"{version:08d}", ignore_errors=True)
        metadist("resume", run_dir)  # from step 0, whose checkpoint has seen no end of a process
        assert json.loads((run_dir / "summary.json").read_text())["restarts"]["driver"] == times
    (run_dir / ".restarts").write_text("[]")
    metadist("resume", run_dir, "outer.steps=9")
    assert json.loads((run_dir / "summary.json").read_text())["restarts"]["driver"] == 4, "the checkpoint's, plus one"
