"""The pipeline benchmark compares like with like: every side is checked, and a wrong one is found out."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metadist.episode import Episode, Examples
from tests.conftest import ROOT

SCRIPT = ROOT / "tools" / "bench" / "pipeline.py"
KEYS = {"workload", "implementation", "episodes_per_s", "ratio_to_folder", "data_wait_share"}


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_pipeline", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_pipeline"] = module
    spec.loader.exec_module(module)
    return module


bench = load()


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The Omniglot workload at a tiny size, and its packed set."""
    work, path, what = bench.omniglot(tmp_path_factory.mktemp("characters"), bench.TINY)
    assert "made-up" in what
    return work, path


def test_every_side_is_checked_and_has_a_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows, what = bench.measure(["omniglot", "jpeg"], bench.TINY, tmp_path / "no peers")
    assert all(set(r) == KEYS and r["episodes_per_s"] > 0 and r["data_wait_share"] is None for r in rows)
    sides: dict[str, list[str]] = {}
    for r in rows:
        sides.setdefault(r["workload"], []).append(r["implementation"])
        assert r["implementation"] != bench.FOLDER or r["ratio_to_folder"] == 1
    assert [len(set(s)) for s in sides.values()] == [8, 4]
    told = capfd.readouterr()
    assert "learn2learn is left out (learn2learn is not in" in told.err
    assert "made-up characters; METADIST_DATA names the directory" in told.out and "made-up" in what


def test_the_made_up_data_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        bench.draw_characters(tmp_path / name, 2)
        bench.draw_jpegs(tmp_path / name, 2, 3)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*g"))
    assert len(files) == 2 * 20 + 2 * 3
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def spoilt(episode: Episode, how: str) -> Episode:
    support, query = (Examples(s.x.clone(), s.y.clone()) for s in (episode.support, episode.query))
    if how == "label":
        query.y[0] = 1
    elif how == "pixel":
        query.x[0, 0, 3, 3] = 7 / 255 if query.x[0, 0, 3, 3] == 0 else 0
    elif how == "scale":
        query.x.mul_(2)
    elif how == "swap":
        query.x[[0, 1]] = query.x[[1, 0]]
    elif how == "twice":
        query.x[0] = support.x[0]
    elif how == "one class":
        support.x[1], query.x[1] = support.x[0], query.x[0]
    elif how == "turn":
        query.x[0] = torch.rot90(query.x[0], 1, (1, 2))
    return Episode(support, query)


FAULTS = {
    "nothing": None,
    "label": "examples of each class are [0, 2, 1, 1, 1], not 1 of 5",
    "pixel": "class 0 shows what is no picture of the folder",
    "scale": "pixels are not float32 of 0, 1/255, ..., 1",
    "swap": "class 0 shows several classes, or one that another shows",
    "twice": "class 0 shows a picture twice",
    "one class": "class 1 shows several classes, or one that another shows",
    "turn": "class 0 shows several classes, or one that another shows",
}


@pytest.mark.parametrize("how", FAULTS)
def test_a_wrong_episode_is_found_out(characters: tuple[Any, Path], how: str) -> None:
    work, _ = characters
    pictures = bench.known(work)
    for episode in itertools.islice(bench.folder(work), 5):
        assert bench.fault(spoilt(episode, how), work, pictures) == FAULTS[how]
    if how != "nothing":
        with pytest.raises(SystemExit, match="pipeline: theirs gives a wrong episode"):
            bench.check((spoilt(e, how) for e in bench.folder(work)), "theirs", work, pictures, 3)


def test_a_side_with_pixels_of_its_own_is_found_out(characters: tuple[Any, Path]) -> None:
    """The check is of the bits: another filter for reducing the drawings would be another data set."""
    work, path = characters

    def nearest(file: Path, turn: int) -> np.ndarray:
        with Image.open(file) as drawing:
            return np.rot90(255 - np.asarray(drawing.convert("L").resize((28, 28), Image.Resampling.NEAREST)), turn)

    other = dataclasses.replace(work, load=nearest)
    bench.check(bench.folder(other), "theirs", other, bench.known(other), 10)
    with pytest.raises(SystemExit, match="ours gives a wrong episode: class 0 shows what is no picture of the folder"):
        bench.check(bench.stream(work, path, None, True), "ours", other, bench.known(other), 10)


def test_all_sides_serve_every_turn_of_every_training_class(characters: tuple[Any, Path]) -> None:
    work, path = characters
    classes = {c for c, _, _ in work.pictures}
    pictures = bench.known(work)

    def seen(served: Any) -> set[int]:
        episodes = itertools.islice(served, 250)
        shown = (x[0].mul(255).round().to(torch.uint8).numpy() for e in episodes for x in e.query.x)
        return {c for x in shown for c, _ in pictures[bench.fingerprint(x)]}

    assert seen(bench.folder(work)) == seen(bench.stock_webdataset(work, path)) == classes
    assert seen(bench.stream(work, path, None, True)) == seen(bench.stream(work, path, 20, True)) == classes


def test_a_batch_counts_as_its_episodes(characters: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    work, path = characters
    ticks = itertools.count(0.0, 0.5)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    assert bench.turn(bench.batches(work, path, None, True, together=4), 1.1) == pytest.approx(2 * 4 / 1.5)


def test_the_first_round_and_the_first_steps_do_not_count(
    characters: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([1.0, 1000.0, 10.0, 25.0])
    monkeypatch.setattr(bench, "check", lambda *_: None)
    monkeypatch.setattr(bench, "turn", lambda *_: next(rates))
    rows = bench.compare(characters[0], {bench.FOLDER: iter([]), "ours": iter([])}, bench.TINY)
    assert [(r["episodes_per_s"], r["ratio_to_folder"]) for r in rows] == [(10, 1), (25, 2.5)]

    def trained(*_: Any, **__: Any) -> Any:
        (tmp_path / "run").mkdir()
        slow = [{"version": v, "tasks_per_s": 1.0, "step_s": 9.0, "data_wait_s": 9.0} for v in range(1, 6)]
        good = [{"version": v, "tasks_per_s": 50.0, "step_s": 2.0, "data_wait_s": 0.01} for v in range(6, 9)]
        (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, slow + good)))
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(bench.subprocess, "run", trained)
    (row,) = bench.step_rows(tmp_path, tmp_path, "made-up", bench.TINY)
    assert (row["episodes_per_s"], row["ratio_to_folder"], row["data_wait_share"]) == (50, None, 0.005)


def test_it_writes_rows_and_nothing_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [bench.row("omniglot", "ours", [2000.0], [100.0]), bench.row("step", "run", [60.0], [], [0.0003])]
    monkeypatch.setattr(bench, "measure", lambda *_: (rows, "Omniglot"))
    monkeypatch.setattr(sys, "argv", ["pipeline.py", "--json", str(tmp_path / "out" / "p.json")])
    threads = torch.get_num_threads()
    bench.main()
    torch.set_num_threads(threads)
    text = (tmp_path / "out" / "p.json").read_text()
    assert json.loads(text)["rows"] == rows and str(tmp_path) not in text
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [["omniglot", "ours", "2,000", "20.0", ""], ["step", "run", "60", "", "0.03%"]]


def test_it_explains_itself_with_an_example(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--quick" in done.stdout and "--tiny" not in done.stdout
    assert "python tools/bench/pipeline.py --quick --json" in done.stdout and "learn2learn" in done.stdout


def test_learn2learn_gives_the_same_kind_of_episode(characters: tuple[Any, Path]) -> None:
    work, _ = characters
    try:
        bench.learn2learn_data(ROOT / ".peers")
    except ImportError:
        pytest.skip("build learn2learn in .peers (see the benchmark's --help) to run this")
    bench.check(bench.learn2learn(work, ROOT / ".peers"), "learn2learn", work, bench.known(work), 10)
