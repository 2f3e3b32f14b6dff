"""The report and its pictures, made from a run's files alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot
import numpy as np
import pytest
import torch
from PIL import Image

from metadist.episode import EpisodeBatch, Examples
from metadist.errors import RunDirError
from metadist.figures import LIGHT, _spread, draw_by_instance, metric_of, running_mean
from metadist.report import _time_shares, draw_episodes, draw_learning_curve, write_report
from metadist.tasks.glyphs import GlyphTasks
from metadist.tasks.sinusoid import SinusoidTasks

SHA = "0123456789abcdef" * 4
EVALUATION = {"version": 40, "split": "test", "episodes": 600, "metric": "accuracy", "pre_adaptation": 0.2014,
              "mean": 0.9481, "ci95": 0.0085, "batchnorm": "transductive"}  # fmt: skip
HOSTILE = "<script>alert('&')</script>"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run whose every text tries to break out of the page."""
    config = {"name": f"run {HOSTILE}", "tasks": {"type": "glyphs"}, "store": {"api_key": "hunter2"}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    lines = [
        {"version": v, "loss": 1.6 / v, "accuracy": 1 - 0.8 / v, "pre_adaptation_loss": 1.6,
         "pre_adaptation_accuracy": 0.2, "step_s": 0.2, "data_s": 0.05, "compute_s": 0.1, "transfer_s": 0.02,
         "wait_s": 0.02, "update_s": 0.01}
        for v in range(1, 41)
    ]  # fmt: skip
    lines[5]["loss"] = None  # type: ignore[assignment]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"version": 41, "lo')
    (tmp_path / "evaluations.jsonl").write_text(json.dumps({**EVALUATION, "split": HOSTILE}) + "\n")
    summary = {"version": 40, "tasks_seen": 12345, "tasks_per_s": 61.25, "wall_s": 3725, "workers": 2,
               "meta_params_sha256": SHA, "evaluation": {**EVALUATION, "batchnorm": HOSTILE},
               "restarts": {"worker": 7, HOSTILE: 0}, "releases": 19, "wandb_run": HOSTILE,
               "code": {"metadist": "9.8.7", "commit": HOSTILE}, "content_id": "c0ffee"}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


class Page(HTMLParser):
    """A page's text and what it refers to."""

    VOID = ("meta", "img", "source", "link", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words, self.tags, self.links, self.open = "", [], [], []  # type: ignore[var-annotated]
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "srcset", "href", "action", "data", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags are not nested"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data + " "


def test_the_page_tells_everything(run_dir: Path) -> None:
    page = Page(write_report(run_dir).read_text())
    words = re.sub(r"\s+", " ", page.words)
    for wanted in ("20.1 %", "94.81 ± 0.85 %", "600", "12,345", "61.2", "1:02:05", SHA):
        assert wanted in words
    assert "restarts, worker 7" in words and "leases released and given again 19" in words
    for wanted in ("data 25.0 %", "compute 50.0 %", "transfer 10.0 %", "wait 10.0 %", "update 5.0 %"):
        assert wanted in words
    assert "metadist 9.8.7" in words and "data set c0ffee" in words
    assert "type: glyphs" in words and "hunter2" not in words
    assert (run_dir / "learning_curve.png").is_file()
    assert page.open == []


def test_the_page_fetches_nothing_and_escapes_everything(run_dir: Path) -> None:
    Image.new("L", (20, 10)).save(run_dir / "episodes.png")
    html = write_report(run_dir).read_text()
    page = Page(html)
    assert len(page.links) == 3, "learning curve by day and by night, and the episodes"
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "script" not in page.tags and "link" not in page.tags and "<script" not in html
    assert "http" not in re.sub(r"data:image/png;base64,[\w+/=]+", "", html).replace("http-equiv", "")
    assert page.words.count(HOSTILE) >= 6, "a text is missing"
    assert "width=device-width" in html and "prefers-color-scheme: dark" in html


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: young\n")
    words = Page(write_report(tmp_path).read_text()).words
    assert "The final evaluation has not been made yet." in words and "young" in words


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"is not a run directory: it holds no config\.yaml$"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_summary_is_no_obstacle(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text('{"version": 4')
    assert "has not been made yet" in write_report(run_dir).read_text()


def _shows(path: Path, colour: str) -> int:
    """How many pixels of a picture have about this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(_pixels(path) - wanted).max(axis=-1) < 12).sum())


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_the_learning_curve_shows_before_after_and_evaluations(run_dir: Path) -> None:
    path = draw_learning_curve(run_dir)
    assert path == run_dir / "learning_curve.png"
    assert _shows(path, LIGHT["before"]) > 1000 and _shows(path, LIGHT["after"]) > 1000
    first = path.read_bytes()
    assert draw_learning_curve(run_dir).read_bytes() == first
    (run_dir / "evaluations.jsonl").unlink()
    assert draw_learning_curve(run_dir).read_bytes() != first, "evaluations are not drawn"
    assert not matplotlib.pyplot.get_fignums(), "pyplot's state was touched"
    assert not [p for p in run_dir.iterdir() if p.name.startswith(".")]


def test_the_accuracy_by_instance_is_drawn_where_it_was_measured(run_dir: Path) -> None:
    path, picture = run_dir / "summary.json", run_dir / "accuracy_by_instance.png"
    assert draw_by_instance(run_dir) is None
    without = Page(write_report(run_dir).read_text())
    assert not picture.exists() and "Accuracy by instance" not in without.words
    summary = json.loads(path.read_text())
    summary["evaluation"]["by_instance"] = {str(n): {"mean": 1 - 0.6 / n, "ci95": 0.01} for n in range(1, 11)}
    path.write_text(json.dumps(summary))
    page = Page(write_report(run_dir).read_text())
    assert "Accuracy by instance" in page.words and len(page.links) == len(without.links) + 2
    assert _shows(picture, LIGHT["after"]) > 500


def test_a_regression_has_one_panel_and_an_empty_run_says_so(tmp_path: Path) -> None:
    heights = {}
    for name in ("accuracy", "mean_squared_error"):
        row = {"version": 1, "loss": 2.0, name: 2.0, "pre_adaptation_loss": 3.0, f"pre_adaptation_{name}": 3.0}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        with Image.open(draw_learning_curve(tmp_path)) as picture:
            heights[name] = picture.height
    assert heights["accuracy"] == 2 * heights["mean_squared_error"]
    (tmp_path / "metrics.jsonl").unlink()
    assert _shows(draw_learning_curve(tmp_path), LIGHT["after"]) == 0


def test_the_metric_is_the_one_steps_give_before_adaptation_too() -> None:
    row = {"version": 1, "loss": 1, "pre_adaptation_loss": 1, "grad_norm": 2, "f1": 0.5, "pre_adaptation_f1": 0.1}
    assert metric_of([row], {}) == "f1"
    assert metric_of([row], {"evaluation": {"metric": "accuracy"}}) == "accuracy"
    assert metric_of([], {}) == "accuracy"


def test_the_running_mean_is_centred_and_begins_where_the_values_do() -> None:
    np.testing.assert_allclose(running_mean(np.array([0.0, 3, 6, 9, 30]), 1), [0, 3, 6, 15, 19.5])
    np.testing.assert_allclose(running_mean(np.array([4.0]), 3), [4])


def test_shares_of_the_time_add_up_in_the_order_of_a_step() -> None:
    rows = [{"step_s": 1.0, "update_s": 0.25, "data_s": 0.5, "wait_s": None}, {"compute_s": 0.25, "transfer_s": 0.0}]
    assert _time_shares(rows) == [("data", 0.5), ("compute", 0.25), ("update", 0.25)]
    assert _time_shares([{"step_s": 1.0}]) == []


def test_the_adaptation_curve_is_a_table(run_dir: Path) -> None:
    assert "step by step" not in write_report(run_dir).read_text()
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["evaluation"]["by_step"] = {"0": {"loss": 1.6, "accuracy": 0.2}, "1": {"loss": 0.51, "accuracy": 0.9}}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    words = re.sub(r"\s+", " ", Page(write_report(run_dir).read_text()).words)
    assert "inner steps loss accuracy 0 1.6 20.0 % 1 0.51 90.0 %" in words


def test_the_grid_frames_right_and_wrong_answers(tmp_path: Path) -> None:
    batch = GlyphTasks(query_shots=2, split="test").episodes(0, "test", range(3))
    right, wrong = batch.query.y, (batch.query.y + 1) % 5
    green, red = "#2e9e5b", "#d64545"
    path = tmp_path / "episodes.png"
    assert draw_episodes(batch, path, wrong, right) == path
    assert _shows(path, green) > 1000 and _shows(path, red) == 0, "the frame is not that of the last answer"
    outputs = torch.nn.functional.one_hot(wrong, 5).float()
    draw_episodes(batch, path, None, outputs)
    assert _shows(path, red) > 1000 and _shows(path, green) == 0
    draw_episodes(batch, path)
    assert _shows(path, red) == _shows(path, green) == 0


def test_colour_pictures_of_any_range_are_drawn(tmp_path: Path) -> None:
    x, y = torch.randn(1, 4, 3, 16, 16) * 3, torch.tensor([[0, 0, 1, 1]])
    assert draw_episodes(EpisodeBatch(Examples(x, y), Examples(x, y)), tmp_path / "a.png") is not None
    assert len(np.unique(_pixels(tmp_path / "a.png").reshape(-1, 3), axis=0)) > 500


def test_shown_queries_are_spread_over_the_classes() -> None:
    labels = np.repeat(np.arange(5), 15)
    assert np.bincount(labels[_spread(labels, 10)]).tolist() == [2] * 5
    assert len(_spread(np.repeat(np.arange(20), 1), 10)) == 10


def test_functions_are_plotted_with_both_predictions(tmp_path: Path) -> None:
    batch, path = SinusoidTasks().episodes(0, "test", range(3)), tmp_path / "episodes.png"
    assert draw_episodes(batch, path, torch.zeros_like(batch.query.y), batch.query.y) == path
    assert _shows(path, LIGHT["before"]) > 200 and _shows(path, LIGHT["after"]) > 200
    draw_episodes(batch, path)
    assert _shows(path, LIGHT["before"]) == _shows(path, LIGHT["after"]) == 0


def test_other_episodes_get_no_picture(tmp_path: Path) -> None:
    features = EpisodeBatch(*[Examples(torch.zeros(1, 4, 7), torch.zeros(1, 4, dtype=torch.int64))] * 2)
    assert draw_episodes(features, tmp_path / "a.png") is None
    assert list(tmp_path.iterdir()) == []
