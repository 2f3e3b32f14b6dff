"""Using what was learned: adapted to somebody's pictures without the training data, and exported to torch alone."""

from __future__ import annotations

import copy
import csv
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import metadist as md
from metadist.adapting import adapt, predict
from metadist.cli import main
from metadist.config import validate
from metadist.data import pack_folder
from metadist.data.manifest import Field
from metadist.data.pack import pack_classes
from metadist.experiment import Experiment
from metadist.exporting import Scores
from metadist.inputs import Inputs
from metadist.training import train

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (128, 128, 128),
           "yellow": (230, 220, 20), "pink": (240, 120, 200)}  # fmt: skip
LEARNERS: dict[str, dict[str, Any]] = {
    "maml": {"algorithm": {"type": "maml", "inner_lr": 0.1, "inner_steps": 2}},
    "inductive": {"algorithm": {"type": "maml", "inner_lr": 0.1, "inner_steps": 2}, "batchnorm": "inductive"},
    "running": {"algorithm": {"type": "anil", "inner_lr": 0.1, "inner_steps": 2}, "batchnorm": "running"},
    "protonet": {"algorithm": {"type": "protonet"}, "batchnorm": "inductive"},
    "matchingnet": {"algorithm": {"type": "matchingnet"}},
    "protomaml": {"algorithm": {"type": "protomaml", "inner_lr": 0.1}, "batchnorm": "inductive"},
    "snail": {"algorithm": {"type": "snail"}},
}
WAYS, SIDE = 4, 16


def draw(folder: Path, classes: dict[str, int], size: tuple[int, int] = (40, 30), start: int = 0) -> Path:
    """Noisy patches of a colour, so many of each class."""
    for name, count in classes.items():
        rng = np.random.default_rng([start, *name.encode()])
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise = rng.normal(0, 40, (size[1], size[0], 3))
            pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of each learner, whose training data are gone."""
    folder = tmp_path_factory.mktemp("using")
    draw(folder / "pictures", dict.fromkeys(COLOURS, 6))
    splits = folder / "splits.json"
    splits.write_text(json.dumps({"train": list(COLOURS)[:5], "test": list(COLOURS)[5:]}))
    pack_folder(folder / "pictures", folder / "set", size=SIDE, splits=splits)
    for name, changes in LEARNERS.items():
        order = "shuffled" if name == "snail" else "by_class"
        config = {
            "tasks": {"type": "shards", "path": str(folder / "set"), "ways": WAYS, "shots": 2, "query_shots": 2,
                      "order": order},
            "model": {"type": "conv4", "filters": 8, "batchnorm": changes.get("batchnorm", "transductive")},
            "algorithm": changes["algorithm"],
            "engine": {"compile": False},
            "outer": {"steps": 3, "meta_batch_size": 2, "tasks_per_microbatch": 2},
            "runtime": {"type": "local"},
            "evaluation": {"episodes": 2, "split": "train"},
            "tracking": {"wandb": {"mode": "disabled"}, "console": False},
        }  # fmt: skip
        train(Experiment(validate(config, "the test")), folder / name)
    shutil.rmtree(folder / "set")
    return folder


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Known examples, uneven, and unknown ones in folders of their classes."""
    draw(tmp_path / "known", {"red": 3, "green": 1, "blue": 2})
    draw(tmp_path / "unknown", {"red": 2, "green": 2, "blue": 1}, size=(64, 64), start=1)
    return tmp_path


def metadist(*words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(w) for w in words])
    return int(stopped.value.code or 0), ""


def told(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert metadist(*words)[0] == 0
    return json.loads(capsys.readouterr().out)


def prepared(path: Path) -> torch.Tensor:
    """A picture as `data pack folder` brings it to the run's size."""
    from PIL import ImageOps

    fitted = ImageOps.fit(Image.open(path).convert("RGB"), (SIDE, SIDE), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted).transpose(2, 0, 1).copy()).float() / 255


# --------------------------------------------------------------------------- adapt


@pytest.mark.parametrize("name", LEARNERS)
def test_the_answers_are_the_learners_own(
    runs: Path, mine: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told(capsys, "adapt", runs / name, "--support", mine / "known", "--query", mine / "unknown", "--json")
    assert found["support"] == {"blue": 2, "green": 1, "red": 3}
    classes = list(found["support"])
    files = sorted((mine / "known").rglob("*.png"), key=lambda p: p.relative_to(mine / "known").parts)
    x = torch.stack([prepared(p) for p in files])
    y = torch.tensor([classes.index(p.parent.name) for p in files])
    if name == "snail":
        x, y = (t[md.Rng(0, "adapting/support").permutation(len(y))] for t in (x, y))
    learner = md.load(runs / name)
    learner.algorithm = learner.algorithm.with_ways(3)
    model = learner.adapt((x, y))
    asked = [mine / "unknown" / p["name"] for p in found["predictions"]]
    assert len(asked) == 5
    wanted = model(torch.stack([prepared(p) for p in asked]))[:, :3].softmax(-1)
    for row, p, path in zip(wanted.tolist(), found["predictions"], asked, strict=True):
        assert list(p["probabilities"]) == classes and sum(p["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert list(p["probabilities"].values()) == pytest.approx(row, abs=1e-5)
        assert p["class"] == classes[int(np.argmax(row))] and p["truth"] == path.parent.name
    right = [p["class"] == p["truth"] for p in found["predictions"]]
    assert found["accuracy"] == pytest.approx(np.mean(right))


def test_a_table_a_file_and_one_picture(runs: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["adapt", runs / "protonet", "--support", mine / "known", "--query"]
    assert metadist(*words, mine / "unknown", "--out", mine / "answers.csv")[0] == 0
    shown = capsys.readouterr()
    assert "% of 5 are right" in shown.out and "red/0.png" in shown.out and not shown.err
    rows = list(csv.DictReader((mine / "answers.csv").open()))
    assert [r["name"] for r in rows] == ["blue/0.png", "green/0.png", "green/1.png", "red/0.png", "red/1.png"]
    assert all(sum(float(r[f"p({c})"]) for c in COLOURS if f"p({c})" in r) == pytest.approx(1, abs=1e-5) for r in rows)
    one = told(capsys, *words, mine / "unknown" / "red" / "1.png", "--json")
    assert one["accuracy"] is None and "truth" not in one["predictions"][0]
    # Inductive: an answer does not depend on what is asked beside it.
    probability = one["predictions"][0]["probabilities"]["red"]
    assert float(rows[4]["p(red)"]) == pytest.approx(probability, abs=2e-6)
    with zipfile.ZipFile(mine / "known.zip", "w") as archive:
        for path in (mine / "known").rglob("*.png"):
            archive.write(path, path.relative_to(mine / "known"))
    words[3] = mine / "known.zip"
    assert told(capsys, *words, mine / "unknown" / "red" / "1.png", "--json")["predictions"] == one["predictions"]


def test_answers_that_depend_on_each_other_say_so(runs: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert metadist("adapt", runs / "maml", "--support", mine / "known", "--query", mine / "unknown")[0] == 0
    assert "train with model.batchnorm=inductive" in capsys.readouterr().err
    one = ["--support", mine / "known", "--query", mine / "unknown" / "red" / "1.png"]
    assert metadist("adapt", runs / "matchingnet", *one)[0] in (0, 1)  # by what operators there are for its norms
    assert "Traceback" not in capsys.readouterr().err


def test_any_number_of_classes_where_no_layer_fixes_it(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "known", dict.fromkeys(COLOURS, 2))
    for name, ends in (("protonet", 0), ("matchingnet", 0), ("protomaml", 0), ("maml", 1)):
        code, _ = metadist("adapt", runs / name, "--support", tmp_path / "known", "--query", tmp_path / "known")
        assert code == ends, name
        if ends:
            wanted = "holds 6 classes, and the run's network answers with one of 4; leave some out"
            assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gone", "known: is not there; name a folder"),
        ("empty", "known: holds no pictures; give PNG"),
        ("loose", "known: loose.png lies in it directly; put each picture into the folder of its class"),
        ("one class", "known: holds 1 class; give examples of two classes"),
        ("broken", "0.png: cannot be read as an image"),
        ("query", "unknown: is not there"),
        ("suffix", "answers.txt: ends in '.txt'; write to a name that ends in .csv or .json"),
    ],
)
def test_what_is_wrong_is_told(
    runs: Path, mine: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = mine / "known"
    if change in ("gone", "empty", "one class"):
        for klass in ("blue", "green", "red")[: 2 if change == "one class" else 3]:
            shutil.rmtree(known / klass)
        if change == "gone":
            known.rmdir()
    if change == "loose":
        shutil.copy(known / "red" / "0.png", known / "loose.png")
    if change == "broken":
        (known / "red" / "0.png").write_text("no picture")
    if change == "query":
        shutil.rmtree(mine / "unknown")
    out = ["--out", mine / ("answers.txt" if change == "suffix" else "answers.csv")]
    code, _ = metadist("adapt", runs / "maml", "--support", known, "--query", mine / "unknown", *out)
    said = capsys.readouterr().err
    assert code == 1 and message in said and "Traceback" not in said
    assert not list(mine.glob("answers*"))


def test_runs_on_texts_are_asked_by_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sentences(word: str) -> list[bytes]:
        return [f"{word} number {i} of {word}s".encode() for i in range(6)]

    names = ["cat", "dog", "cow", "owl", "ant"]
    classes = [(n, lambda n=n: sentences(n)) for n in names]
    pack_classes(tmp_path / "set", classes, {"train": [0, 1, 2], "test": [3, 4]}, Field("utf-8", ()), name="animals")
    config = {
        "tasks": {"type": "texts", "path": str(tmp_path / "set"), "ways": 2, "shots": 2, "query_shots": 2},
        "model": {"type": "text_bag", "embedding": 64}, "algorithm": {"type": "protonet"}, "engine": {"compile": False},
        "outer": {"steps": 2, "meta_batch_size": 2, "tasks_per_microbatch": 2}, "runtime": {"type": "local"},
        "evaluation": {"episodes": 2}, "tracking": {"wandb": {"mode": "disabled"}, "console": False},
    }  # fmt: skip
    train(Experiment(validate(config, "the test")), tmp_path / "run")
    shutil.rmtree(tmp_path / "set")
    rows = ["label,text", "bee,the bee hums", "bee,a bee and a bee", "fox,the fox ran", "fox,foxes: a fox"]
    (tmp_path / "known.csv").write_text("\n".join(rows))
    (tmp_path / "asked.txt").write_text("is it a bee\n\nis it a fox\n")
    words = ["--support", tmp_path / "known.csv", "--query", tmp_path / "asked.txt", "--json"]
    found = told(capsys, "adapt", tmp_path / "run", *words)
    assert [p["class"] for p in found["predictions"]] == ["bee", "fox"] and found["support"] == {"bee": 2, "fox": 2}


# --------------------------------------------------------------------------- what a run remembers


def test_what_the_tasks_look_like_is_kept_and_read_back() -> None:
    support = md.Examples(torch.rand(6, 3, 5, 4), torch.tensor([0, 0, 1, 1, 2, 2]))
    kept = Inputs.of(md.Episode(support, md.Examples(torch.rand(9, 3, 5, 4), torch.arange(9) % 3)), None)
    assert Inputs.read(json.loads(json.dumps(kept.told()))) == kept and kept.pictures
    example = kept.example()
    assert example.support.x.shape == (6, 3, 5, 4) and example.query.y.shape == (9,)
    assert int(example.support.y.max()) == 2 and example.support.x.unique().numel() == 6 * 60
    with pytest.raises(ValueError, match="'system' is no dtype"):
        Inputs.read({**kept.told(), "x_dtype": "system"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("x", [3, -1, 4]),
        ("x", [1 << 30, 64, 64]), ("y", ["many"]), ("classes", 0), ("query", 2.5), ("support", 1 << 40),
    ],
)
def test_what_no_run_keeps_is_refused_before_room_is_made(field: str, value: Any) -> None:
    support = md.Examples(torch.rand(6, 3, 5, 4), torch.arange(6) % 3)
    kept = Inputs.of(md.Episode(support, support), None).told()
    with pytest.raises((TypeError, ValueError)):
        Inputs.read({**kept, field: value})


def test_learners_trained_on_shuffled_examples_are_not_shown_class_after_class(runs: Path, mine: Path) -> None:
    sequence, pairs = adapt(runs / "snail", mine / "known"), adapt(runs / "protonet", mine / "known")
    assert pairs.model.support_y.tolist() == [0, 0, 1, 2, 2, 2]
    assert sequence.model.support_y.tolist() != [0, 0, 1, 2, 2, 2]
    for x, y in zip(sequence.model.support_x, sequence.model.support_y, strict=True):
        (place,) = (pairs.model.support_x == x).flatten(1).all(1).nonzero()
        assert pairs.model.support_y[place] == y  # each keeps its own label


def test_prototypes_of_another_number_of_classes_leave_no_class_that_is_not_there(runs: Path, mine: Path) -> None:
    for count in (2, 3, 6):
        known = draw(mine / f"known{count}", dict.fromkeys(list(COLOURS)[:count], 2))
        adapted = adapt(runs / "protomaml", known)
        assert adapted.model(torch.rand(5, 3, SIDE, SIDE)).shape == (5, count)


@pytest.mark.parametrize("name", ["snail", "protomaml"])
def test_what_is_served_is_what_adapt_gives(name: str, runs: Path, mine: Path) -> None:
    pytest.importorskip("starlette", reason="metadist[serve] is not installed")
    from metadist.adapting import read_examples
    from metadist.serving.server import Replica, Settings

    known = draw(mine / "more", dict.fromkeys(COLOURS, 2)) if name == "protomaml" else mine / "known"
    adapted = adapt(runs / name, known)
    given = read_examples(known, adapted.inputs, None, labelled=True)
    y = torch.tensor([adapted.classes.index(str(c)) for c in given.classes])
    served = Replica(Settings(runs / name, mine / "kept"))._adapted(given.x, y, len(adapted.classes))
    x = torch.rand(5, 3, SIDE, SIDE)
    assert torch.equal(served(x), adapted.model(x))


@pytest.mark.parametrize("name", LEARNERS)
def test_an_adapted_model_can_be_saved_whole(name: str, runs: Path, mine: Path) -> None:
    model, x = adapt(runs / name, mine / "known").model, torch.rand(3, 3, SIDE, SIDE)
    torch.save(model, mine / "model.pt")
    assert torch.equal(torch.load(mine / "model.pt", weights_only=False)(x), model(x))


def test_an_adapted_model_is_a_module_like_any_other(runs: Path, mine: Path) -> None:
    adapted = adapt(runs / "inductive", mine / "known")
    x = torch.rand(3, 3, SIDE, SIDE)
    wanted = adapted.model(x)
    assert torch.equal(copy.deepcopy(adapted.model)(x), wanted)
    state = adapted.model.state_dict()
    assert {"support_x", "support_y"} <= state.keys() and len(state) > 2
    other = adapt(runs / "inductive", mine / "unknown").model
    assert not torch.allclose(other(x), wanted)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(state)  # five examples are not six


# --------------------------------------------------------------------------- export

EXPORTED = list(LEARNERS)
ALONE = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("metadist", "ray", "wandb", "webdataset", "safetensors", "PIL"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import torch

folder = sys.argv[1]
inputs, outputs = torch.load(f"{folder}/inputs.pt"), {}
for name in json.loads(sys.argv[2]):
    extra = {"metadist.json": ""}
    module = torch.export.load(f"{folder}/{name}.pt2", extra_files=extra).module()
    assert json.loads(extra["metadist.json"])["classes"] == ["blue", "green", "red"]
    outputs[name] = [module(x) for x in inputs]
assert "metadist" not in sys.modules
torch.save(outputs, f"{folder}/outputs.pt")
"""


@pytest.mark.slow
def test_exported_programs_give_the_same_with_torch_alone(runs: Path, mine: Path) -> None:
    inputs = [torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(n)) for n in (2, 1, 7)]
    torch.save(inputs, mine / "inputs.pt")
    for name in EXPORTED:
        code, _ = metadist("export", runs / name, "--support", mine / "known", "--out", mine / f"{name}.pt2")
        assert code == 0, name
        about = json.loads((mine / f"{name}.json").read_text())
        assert about["classes"] == ["blue", "green", "red"] and about["inputs"]["shape"] == ["N", 3, SIDE, SIDE]
        assert ("note" in about) == (about["batchnorm"] == "transductive")
    words = [sys.executable, "-I", "-c", ALONE, str(mine), json.dumps(EXPORTED)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, cwd=mine)
    assert done.returncode == 0, done.stderr
    outputs = torch.load(mine / "outputs.pt")
    for name in EXPORTED:
        # Fused operators, where a run has them, round otherwise.
        for plain, within in ((True, 1e-6), (False, 1e-4)):
            scores = Scores(adapt(runs / name, mine / "known", plain=plain))
            for x, got in zip(inputs, outputs[name], strict=True):
                if len(x) == 1 and LEARNERS[name].get("batchnorm") is None:
                    continue  # it would be normalised by itself
                with torch.no_grad():
                    torch.testing.assert_close(got, scores(x), rtol=within, atol=within)


def test_adapted_tensors_by_the_names_of_the_network(runs: Path, mine: Path) -> None:
    from safetensors.torch import load_file

    out = mine / "mine.safetensors"
    words = ["export", runs / "inductive", "--support", mine / "known", "--out", out, "--format", "safetensors"]
    assert metadist(*words)[0] == 0
    adapted, kept = adapt(runs / "inductive", mine / "known", plain=True), load_file(out)
    network = md.load(runs / "inductive").algorithm.model.module
    assert set(kept) == set(dict(network.named_parameters()))
    missing, unexpected = network.load_state_dict(kept, strict=False)
    assert not unexpected and not set(missing) & set(kept)
    for name, value in adapted.model.named_values().items():
        assert torch.equal(kept[name], value.detach())
    assert json.loads(out.with_suffix(".json").read_text())["tensors"].keys() == kept.keys()


def test_a_computation_that_cannot_be_exported_is_told(
    runs: Path, mine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def untraceable(self: Scores, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) * float(x.sum())

    monkeypatch.setattr(Scores, "forward", untraceable)
    words = ["export", runs / "snail", "--support", mine / "known", "--out", mine / "mine.pt2"]
    assert metadist(*words)[0] == 1
    assert "its learner cannot be exported by torch.export" in capsys.readouterr().err
    assert not list(mine.glob("mine*"))


@pytest.mark.parametrize(("kind", "name"), [("torch-export", "a.bin"), ("safetensors", "a.pt2")])
def test_a_name_of_another_kind_is_refused(
    runs: Path, mine: Path, kind: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", runs / "maml", "--support", mine / "known", "--out", mine / name, "--format", kind]
    assert metadist(*words)[0] == 1
    assert "write to a name that ends in ." in capsys.readouterr().err and not (mine / name).exists()


def test_nothing_half_written_stays(runs: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = mine / "nowhere" / "mine.pt2"
    assert metadist("export", runs / "inductive", "--support", mine / "known", "--out", out)[0] == 1
    assert "cannot be written" in capsys.readouterr().err and not out.parent.exists()
    for words in (["export", "--format", "safetensors", "--out", mine / "nowhere" / "mine.safetensors"],
                  ["adapt", "--query", mine / "unknown", "--out", mine / "nowhere" / "a.csv"]):  # fmt: skip
        assert metadist(words[0], runs / "inductive", "--support", mine / "known", *words[1:])[0] == 1
        assert "cannot be written" in capsys.readouterr().err and not out.parent.exists()
    assert predict(adapt(runs / "inductive", mine / "known"), mine / "unknown")
