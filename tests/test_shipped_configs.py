"""Every shipped config says what it is for, and runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load as load_tensors

from metadist.cli import main
from metadist.config import load_config
from metadist.config.load import read_yaml
from metadist.data import pack_arrays, pack_ratings
from metadist.data.manifest import Field
from metadist.data.pack import pack_classes
from metadist.outer.gradient import sha256_of
from metadist.tasks.glyphs import glyph_images
from metadist.tracking.base import PARTS
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


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for CLINC150."""
    out = tmp_path_factory.mktemp("configs") / "texts"
    classes = [(f"k{c}", lambda c=c: [f"word{c} number {i}".encode() for i in range(10)]) for c in range(16)]
    splits = {"train": list(range(8)), "test": list(range(8, 15)), "oos": [15]}
    pack_classes(out, classes, splits, Field("utf-8", ()), name="texts")
    return out


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for MovieLens."""
    folder = tmp_path_factory.mktemp("configs")
    rows = [f"{user},{item},{1 + (user * item) % 5},{item}" for user in range(20) for item in range(25)]
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows]))
    pack_ratings(folder / "ratings.csv", folder / "ratings")
    return folder / "ratings"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_it_has_a_header_and_its_own_name(path):
    assert path.read_text().startswith("# "), "wanted a comment on what it reproduces and what to expect"
    assert load_config(path).name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_it_runs_two_steps(path, request, tmp_path):
    kind = read_yaml(path)["tasks"]["type"]
    words = [*SMALL, ALONE]
    if kind in ("shards", "texts", "ratings"):
        words.append(f"tasks.path={request.getfixturevalue(kind)}")
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
    "learning/grad_norm", "throughput/tasks_per_s", "time/step_s", "time/data_s", "time/compute_s", "time/transfer_s",
    "time/wait_s", "time/update_s", "staleness/staleness", "workers/workers", "workers/0_s", "workers/0_utilisation",
    "restarts/worker", "restarts/server", "restarts/driver", "restarts/releases",
}  # fmt: skip
JUDGED = {
    "evaluation/test_accuracy", "evaluation/test_pre_adaptation_accuracy", "evaluation/test_ci95",
    *(f"adaptation/test_{name}_step_{k}" for name in ("accuracy", "loss") for k in range(4)),
}  # fmt: skip


def test_wandb_holds_the_run_and_a_resumed_run_continues_it(tmp_path):
    """Every panel, the tables and the checkpoints of an offline run, read back; the same run after a resume."""
    run_dir = tmp_path / "run"
    words = [*SMALL, "evaluation.every=2", "evaluation.validation_episodes=2", "evaluation.episodes=5",
             "tracking.wandb.tags=[a, b]"]  # fmt: skip
    arguments = ["train", str(ROOT / "configs" / "glyphs_maml.yaml"), *words, "--run-dir", str(run_dir)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    first = json.loads((run_dir / "summary.json").read_text())
    assert CliRunner().invoke(main, ["resume", str(run_dir), "outer.steps=4"]).exit_code == 0
    runs = [read_offline_run(path) for path in offline_runs(run_dir)]
    assert len(runs) == 2 and len({r["run_id"] for r in runs}) == 1
    assert json.loads((run_dir / "summary.json").read_text())["wandb_run"] == runs[0]["run_id"]
    steps = [row for r in runs for row in r["history"] if "learning/loss" in row]
    assert [row["outer_step"] for row in steps] == [1, 2, 3, 4]
    assert all(set(row) >= METRICS for row in steps)
    for row in steps:
        parts = sum(row[f"time/{part}_s"] for part in PARTS)
        assert parts == pytest.approx(row["time/step_s"], rel=1e-6)
    assert steps[-1]["restarts/driver"] == 1, "the resume is not counted"
    for run in runs:
        assert any(set(row) >= JUDGED for row in run["history"])
        pictures = {name for row in run["history"] for name in row if name.startswith("pictures/")}
        assert pictures == {"pictures/episodes", "pictures/learning_curve"}
    assert runs[0]["config"]["algorithm"]["type"] == "maml" and runs[0]["tags"] == ["a", "b"]
    assert runs[0]["config"]["data"]["content_id"] == first["content_id"] is not None
    assert runs[0]["config"]["code"] == first["code"] and first["code"]["metadist"]
    _assert_episodes(run_dir, runs[0])
    _assert_checkpoints(runs[0], first)


def _assert_episodes(run_dir, run):
    (shown,) = [row["evaluation/test_table"] for row in run["history"] if "evaluation/test_table" in row]
    assert (shown["_type"], shown["nrows"]) == ("table-file", 5)
    (sent,) = [a["files"] for a in run["artifacts"] if a["type"] == "run_table"]
    assert all(Path(path).is_relative_to(run_dir) for path in sent.values())
    found = json.loads(Path(sent["evaluation/test_table.table.json"]).read_text())
    assert found["columns"] == ["episode", "picture", "accuracy before", "accuracy after"]
    assert [row[0] for row in found["data"]] == list(range(5))
    for _, picture, before, after in found["data"]:
        assert Path(sent[picture["path"]]).read_bytes().startswith(b"\x89PNG")
        assert 0 <= before <= 1 and 0 <= after <= 1


def _assert_checkpoints(run, summary):
    sent = [a for a in run["artifacts"] if a["type"] == "model"]
    (latest,) = [a for a in sent if "latest" in a["aliases"]]
    (best,) = [a for a in sent if "best" in a["aliases"]]
    assert latest["name"] == best["name"] == f"checkpoint-{run['run_id']}"
    assert best["metadata"]["version"] == summary["best"]["version"]
    assert latest["metadata"]["meta_params_sha256"] == summary["meta_params_sha256"]
    assert set(latest["files"]) == {"meta_params.safetensors", "outer_state.safetensors", "state.json"}
    params = load_tensors(Path(latest["files"]["meta_params.safetensors"]).read_bytes())
    order = json.loads(Path(latest["files"]["state.json"]).read_text())["layout"]
    assert sha256_of({name: params[name] for name in order}) == summary["meta_params_sha256"]


def test_no_checkpoint_is_sent_where_none_is_wanted(tmp_path):
    run_dir = tmp_path / "run"
    words = [*SMALL, "tracking.wandb.artifacts=false"]
    arguments = ["train", str(ROOT / "configs" / "sinusoid_maml.yaml"), *words, "--run-dir", str(run_dir)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    (file,) = offline_runs(run_dir)
    assert not [a for a in read_offline_run(file)["artifacts"] if a["type"] == "model"]
