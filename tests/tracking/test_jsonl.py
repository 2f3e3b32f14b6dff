"""A line a step, exactly once each, across crashes and resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metadist.tracking import JsonlTracker, RunInfo
from metadist.tracking.jsonl import plain, read_lines


def _started(run_dir: Path, version: int = 0) -> JsonlTracker:
    tracker = JsonlTracker()
    tracker.start(RunInfo(run_dir, start_version=version))
    return tracker


def _evaluation(mean: float, split: str = "test") -> dict[str, object]:
    return {"split": split, "episodes": 600, "metric": "accuracy", "pre_adaptation": 0.2, "mean": mean, "ci95": 0.01,
            "batchnorm": "transductive"}  # fmt: skip


def test_each_step_is_one_line_on_disk_at_once(tmp_path: Path) -> None:
    tracker = _started(tmp_path)
    for version in (1, 2):
        metrics = {"loss": 1.5 / version, "workers": 2, "worker_s": {"0": 0.5}}
        tracker.log(version, metrics)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == version
        assert json.loads(lines[-1]) == {"version": version, **metrics}


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=st.integers(0, 9), resumed=st.integers(0, 9), cut=st.integers(0, 30))
def test_a_resume_leaves_every_version_exactly_once(tmp_path: Path, written: int, resumed: int, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    first = _started(tmp_path)
    for version in range(1, written + 1):
        first.log(version, {"loss": float(version)})
    resumed = min(resumed, written)
    with path.open("ab") as file:  # the process died within a write
        file.write(b'{"version": 1, "loss": 0.25, "x": 1}'[:cut])
    second = _started(tmp_path, resumed)
    for version in range(resumed + 1, 11):
        second.log(version, {"loss": float(version)})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"version": v, "loss": float(v)} for v in range(1, 11)
    ]


def test_a_new_run_starts_with_empty_files(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"version": 1}\n')
    _started(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    _started(tmp_path).log(1, {"loss": float("nan"), "grad_norm": np.float32("inf"), "n": {"x": -float("inf")}})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"version": 1, "loss": None, "grad_norm": None, "n": {"x": None}}


def test_scalars_of_numpy_and_unknown_things_become_plain() -> None:
    value = plain({"a": np.int64(3), "b": np.float32(0.5), "c": (1, True), "d": Path("x"), "e": np.array(2)})
    assert value == {"a": 3, "b": 0.5, "c": [1, True], "d": "x", "e": 2}
    assert type(value["a"]) is int and type(value["b"]) is float and value["c"][1] is True


def test_evaluations_have_their_own_file_and_the_same_rule(tmp_path: Path) -> None:
    first = _started(tmp_path)
    first.log_evaluation(5, _evaluation(0.8, "validation"))
    first.log_evaluation(10, _evaluation(0.9, "validation"))
    second = _started(tmp_path, 5)
    second.log_evaluation(10, _evaluation(0.91, "validation"))
    second.log_evaluation(10, _evaluation(0.7, "test"))
    found = [(e["version"], e["split"], e["mean"]) for e in read_lines(tmp_path / "evaluations.jsonl")]
    assert found == [(5, "validation", 0.8), (10, "validation", 0.91), (10, "test", 0.7)]


def test_an_evaluation_made_again_replaces_the_old_one(tmp_path: Path) -> None:
    _started(tmp_path).log_evaluation(10, _evaluation(0.9))
    again = _started(tmp_path, 10)
    again.log_evaluation(10, _evaluation(0.95))
    assert [e["mean"] for e in read_lines(tmp_path / "evaluations.jsonl")] == [0.95]


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = _started(tmp_path)
    tracker.log(1, {"loss": 1.0})
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))
        with pytest.raises(OSError, match="only 5 of"):
            tracker.log(2, {"loss": 2.0})
    tracker.log(3, {"loss": 3.0})
    assert [json.loads(x)["version"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3], (
        "the line waited for room"
    )


def test_reading_skips_what_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_bytes(b'{"version": 1}\n[1]\n{"version"\n\xff\xfe\n{"version": 2}')
    assert [line["version"] for line in read_lines(path)] == [1, 2]
    with pytest.raises(IsADirectoryError):
        read_lines(tmp_path)
