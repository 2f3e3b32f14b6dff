"""A run on other data than its own, beside centroids and fine-tuning: each by its definition."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from metadist.baselines import (
    features_of,
    fine_tuned,
    inputs_centroid,
    inverse_document_frequency,
    words_centroid,
)  # fmt: skip
from metadist.cli import main
from metadist.config import validate
from metadist.crossing import NEAREST, PLAIN, RUN, SCRATCH, TUNED, WORDS, Crossing, crossed
from metadist.data import pack_arrays
from metadist.data.manifest import Field
from metadist.data.pack import pack_classes
from metadist.episode import EpisodeBatch, Examples
from metadist.errors import ConfigError, DataError
from metadist.experiment import Experiment
from metadist.tasks.fitted import Fitted
from metadist.tasks.glyphs import GlyphTasks
from metadist.tasks.shards import ShardTasks
from metadist.training import train

SMALL = {
    "engine": {"compile": False}, "outer": {"steps": 2, "meta_batch_size": 2, "tasks_per_microbatch": 2},
    "runtime": {"type": "local"}, "evaluation": {"episodes": 2}, "tracking": {"wandb": {"mode": "disabled"}},
}  # fmt: skip


def coloured(classes: int = 6, examples: int = 9, side: int = 20) -> np.ndarray:
    """uint8 ``[classes, examples, side, side, 3]``: each class a colour, a little noisy."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (classes, 1, 1, 1, 3))
    return np.clip(colours + rng.normal(0, 20, (classes, examples, side, side, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on small grey pictures, one on texts, and sets of other things."""
    folder = tmp_path_factory.mktemp("crossing")
    names = [f"k{i}" for i in range(6)]
    pack_arrays(coloured(), names, {"test": list(range(6))}, folder / "colour", name="colour")
    grey = coloured(side=14).mean(-1).astype(np.uint8)
    pack_arrays(grey, names, {"train": [0, 1, 2], "test": [3, 4, 5]}, folder / "grey", name="grey")
    words = [(f"w{i}", lambda i=i: [f"word{i} of {e}".encode() for e in range(9)]) for i in range(6)]
    pack_classes(folder / "texts", words, {"train": [0, 1, 2], "test": [3, 4, 5]}, Field("utf-8", ()), name="texts")
    common = {"ways": 3, "shots": 1, "query_shots": 3}
    runs = {
        "pictures": {
            "tasks": {"type": "shards", "path": str(folder / "grey"), **common},
            "model": {"type": "conv4", "filters": 4}, "algorithm": {"type": "maml", "inner_lr": 0.1},
        },
        "any_ways": {
            "tasks": {"type": "shards", "path": str(folder / "grey"), **common},
            "model": {"type": "conv4", "filters": 4}, "algorithm": {"type": "protonet"},
        },
        "prototypes": {
            "tasks": {"type": "shards", "path": str(folder / "grey"), **common},
            "model": {"type": "conv4", "filters": 4}, "algorithm": {"type": "protomaml"},
        },
        "texts_run": {
            "tasks": {"type": "texts", "path": str(folder / "texts"), **common},
            "model": {"type": "text_bag", "embedding": 64}, "algorithm": {"type": "protonet"},
        },
    }  # fmt: skip
    for name, sections in runs.items():
        train(Experiment(validate({**sections, **SMALL}, "the test")), folder / name)
    return folder


def test_a_table_of_several_sets_and_shots(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", world / "pictures", "--data", world / "colour", "--data", world / "grey", "--shots", 1]
    words += ["--shots", 3, "--picture", tmp_path / "p.png"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(w) for w in [*words, "--episodes", 12, "--json"]])
    assert not stopped.value.code
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["name"], r["shots"]) for r in rows[::5]] == [("colour", 1), ("colour", 3), ("grey", 1), ("grey", 3)]
    for row in rows:
        assert row["episodes"] == 12 and row["ways"] == 3 and row["query_shots"] == 3 and row["ci95"] >= 0
        assert row["batchnorm"] == "transductive" and row["content_id"].startswith("sha256:")
    assert [r["method"] for r in rows[:5]] == [RUN, TUNED, SCRATCH, NEAREST, PLAIN]
    # Noisy colours are told apart by their mean: the more of each, the better; and an untrained run does not do better.
    plain = {(r["name"], r["shots"]): r["mean"] for r in rows if r["method"] == PLAIN}
    assert plain["colour", 3] > 0.8 and plain["colour", 3] >= plain["colour", 1]
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.format == "PNG" and picture.size[0] > picture.size[1]
    with pytest.raises(SystemExit):
        main([str(w) for w in [*words, "--episodes", 2]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["data", "method", "1", "shot", "3", "shots"] and len(lines) == 11


def test_the_run_is_judged_as_its_own_evaluation_does(world: Path) -> None:
    """On its own test split, without baselines: the learner's evaluation of the same episodes."""
    (row,) = crossed(world / "pictures", Crossing([world / "grey"], episodes=7, baselines="none"))
    from metadist.finished import load_learner

    learner, _, checkpoint = load_learner(world / "pictures")
    batch = ShardTasks(world / "grey", 3, 1, 3, "test").episodes(0, "crossing/test", range(7))
    found = learner.evaluate(checkpoint.meta_params, batch)["accuracy"]
    assert row["method"] == RUN and row["mean"] == pytest.approx(float(found.mean()), abs=1e-6)


def test_texts_are_compared_by_their_words(world: Path) -> None:
    rows = crossed(world / "texts_run", Crossing([world / "texts"], shots=[2], episodes=10))
    assert [r["method"] for r in rows] == [RUN, TUNED, SCRATCH, NEAREST, WORDS]
    assert rows[-1]["mean"] == 1.0, "each class has a word of its own"
    fewer = crossed(world / "texts_run", Crossing([world / "texts"], shots=[2], episodes=10, baselines="centroids"))
    assert fewer == [rows[0], *rows[3:]]


def test_any_number_of_ways_where_no_layer_fixes_it(world: Path) -> None:
    for name in ("any_ways", "prototypes"):
        (row,) = crossed(world / name, Crossing([world / "colour"], ways=5, episodes=4, baselines="none"))
        assert row["ways"] == 5
    with pytest.raises(ConfigError, match=r"--ways: is 5, and the run's network answers with one of 3; leave it out"):
        crossed(world / "pictures", Crossing([world / "colour"], ways=5))


@pytest.mark.parametrize(
    ("run", "data", "changes", "told"),
    [
        ("pictures", "texts", {}, "holds texts, and the run has learned from pictures"),
        ("texts_run", "colour", {}, "holds pictures, not texts"),
        ("pictures", "nowhere", {}, "nowhere"),
        ("pictures", "colour", {"split": "validation"}, "has no split 'validation'; it has test"),
        ("pictures", "colour", {"shots": [7]}, "10 examples of each class, but .* holds 9"),
    ],
)
def test_what_cannot_be_judged_is_told(world: Path, run: str, data: str, changes: dict[str, Any], told: str) -> None:
    with pytest.raises((DataError, ConfigError), match=told):
        crossed(world / run, Crossing([world / data], episodes=2, **changes))


def test_options_of_other_data_need_other_data(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(world / "pictures"), "--shots", "3"])
    assert stopped.value.code == 2 and "--shots goes with --data" in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_is_told(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", world / "grey", "--episodes", 2, "--baselines", "none", "--picture", tmp_path / "no" / "p.png"]
    with pytest.raises(SystemExit) as stopped:
        main([str(w) for w in ["evaluate", world / "pictures", *words]])
    assert stopped.value.code == 1 and "p.png: cannot be written" in capsys.readouterr().err


def test_runs_without_classes_are_refused(world: Path, tmp_path: Path) -> None:
    sines = {"tasks": {"type": "sinusoid"}, "model": {"type": "mlp"}, "algorithm": {"type": "maml"}, **SMALL}
    train(Experiment(validate(sines, "the test")), tmp_path / "sines")
    with pytest.raises(ConfigError, match="tasks.type: of the run is sinusoid, without classes; leave --data out"):
        crossed(tmp_path / "sines", Crossing([world / "grey"]))
    shutil.rmtree(tmp_path / "sines")


# --------------------------------------------------------------------------- by their definitions


def test_pictures_are_fitted() -> None:
    colour = torch.rand(4, 3, 8, 8)
    batch = EpisodeBatch(Examples(colour[None], torch.zeros(1, 4)), Examples(colour[None], torch.zeros(1, 4)))

    class Source(GlyphTasks):
        def __init__(self) -> None: ...

        def episodes(self, *_: Any) -> EpisodeBatch:  # type: ignore[override]
            return batch

    grey = Fitted(Source(), 1, (8, 8)).episodes(0, "e", [0]).support.x
    torch.testing.assert_close(grey[0, :, 0], 0.299 * colour[:, 0] + 0.587 * colour[:, 1] + 0.114 * colour[:, 2])
    small = Fitted(Source(), 3, (4, 4)).episodes(0, "e", [0]).query.x
    assert small.shape == (1, 4, 3, 4, 4) and small.min() >= 0 and small.max() <= 1
    assert float(small.mean()) == pytest.approx(float(colour.mean()), abs=0.02), "shrinking averages"
    same = Fitted(Source(), 3, (8, 8)).episodes(0, "e", [0]).support.x
    assert torch.equal(same[0], colour)


def test_nearest_centroids_of_inputs_and_words() -> None:
    support = Examples(torch.tensor([[[0.0, 0], [0, 2], [9, 9]]]), torch.tensor([[0, 0, 1]]))
    query = Examples(torch.tensor([[[0.0, 1], [4, 4], [8, 8]]]), torch.tensor([[0, 0, 0]]))
    assert inputs_centroid(EpisodeBatch(support, query), 2).tolist() == [[True, True, False]]
    texts = torch.tensor([[3, 4, 0], [3, 5, 0], [3, 3, 0], [6, 0, 0]])
    weights = inverse_document_frequency(texts, 8)
    wanted = [0, np.log(5), np.log(5), np.log(5 / 4), np.log(5 / 2), np.log(5 / 2), np.log(5 / 2), np.log(5)]
    assert weights.tolist() == pytest.approx(wanted)
    support = Examples(torch.tensor([[[3, 4, 0], [3, 5, 0]]]), torch.tensor([[0, 1]]))
    query = Examples(torch.tensor([[[5, 3, 3], [4, 6, 0]]]), torch.tensor([[1, 0]]))
    assert words_centroid(EpisodeBatch(support, query), 2, weights).tolist() == [[True, True]]


def test_fine_tuning_is_adam_on_all_of_the_network(world: Path) -> None:
    from metadist.finished import load_learner

    learner, experiment, checkpoint = load_learner(world / "pictures")
    parts = features_of(learner, experiment.example())
    assert parts is not None
    features, names = parts
    assert not [n for n in names if n.startswith(learner.model.head_params[0].rpartition(".")[0])]
    params = {k: checkpoint.meta_params[k] for k in names}
    batch = ShardTasks(world / "grey", 3, 2, 3, "test").episodes(0, "e", range(2))
    right = fine_tuned(features, params, batch, 3, rate=0.01, steps=4)
    for task, got in zip(batch, right, strict=True):
        own = {k: v.clone().requires_grad_() for k, v in params.items()}
        width = features(own, task.support.x, task.support.x).shape[-1]
        weight, bias = torch.zeros(width, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.Adam([*own.values(), weight, bias], lr=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            scores = features(own, task.support.x, task.support.x) @ weight + bias
            F.cross_entropy(scores, task.support.y).backward()
            optimizer.step()
        scores = features(own, task.query.x, task.support.x) @ weight + bias
        assert got.tolist() == (scores.argmax(-1) == task.query.y).tolist()
