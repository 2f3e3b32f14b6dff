"""What a person sees of a run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from metadist.tracking import ConsoleTracker, RunInfo

EVALUATION = {"split": "test", "episodes": 600, "metric": "accuracy", "pre_adaptation": 0.2014, "mean": 0.95123,
              "ci95": 0.0052, "batchnorm": "transductive"}  # fmt: skip
STEP = {"loss": 0.25, "accuracy": 0.9, "pre_adaptation_accuracy": 0.21, "tasks_per_s": 61.7, "workers": 2}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _console(run_dir: Path, out: io.StringIO, err: io.StringIO, **run: Any) -> tuple[ConsoleTracker, Clock]:
    clock = Clock()
    tracker = ConsoleTracker(out, err, clock=clock)
    tracker.start(RunInfo(run_dir, **{"name": "glyphs", "total_steps": 100, "workers": 2, **run}))
    return tracker, clock


def test_a_log_gets_a_line_every_few_seconds_and_the_last_step(tmp_path: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    tracker, clock = _console(tmp_path, out, err)
    for version in range(1, 101):
        clock.now += 0.5
        tracker.log(version, STEP)
    lines = err.getvalue().splitlines()
    assert lines[0] == f"glyphs: 100 steps, 2 workers, {tmp_path}"
    assert lines[1] == "step 1/100  loss 0.250  accuracy 21.0 % → 90.0 %  62 tasks/s  2 workers  0:50 left"
    assert lines[-1].startswith("step 100/100") and lines[-1].endswith("0:00 left")
    assert [line.split()[1] for line in lines[1:]] == [f"{v}/100" for v in [*range(1, 100, 10), 100]]
    assert out.getvalue() == ""


def test_where_the_time_goes_is_that_since_it_was_last_said(tmp_path: Path) -> None:
    err = io.StringIO()
    tracker, clock = _console(tmp_path, io.StringIO(), err)
    for version, (compute, wait) in enumerate([(1.0, 0.0), (3.0, 1.0), (1.0, 3.0), (4.0, 0.01)], 1):
        tracker.log(version, {**STEP, "compute_s": compute, "wait_s": wait, "data_s": None})
        clock.now += 3.0
    lines = err.getvalue().splitlines()[1:]
    assert "2 workers  time: compute 100 %  " in lines[0]
    assert "2 workers  time: compute 50 %  wait 50 %  " in lines[1], "steps 2 and 3"


def test_an_alert_is_said(tmp_path: Path) -> None:
    err = io.StringIO()
    tracker, _ = _console(tmp_path, io.StringIO(), err)
    tracker.alert("diverging", "the loss is high")
    assert err.getvalue().splitlines()[-1] == "warning, diverging: the loss is high"


def test_time_left_after_a_resume_counts_this_sessions_steps(tmp_path: Path) -> None:
    err = io.StringIO()
    tracker, clock = _console(tmp_path, io.StringIO(), err, start_version=90)
    clock.now = 4.0
    tracker.log(92, STEP)
    assert "from step 90" in err.getvalue() and err.getvalue().rstrip().endswith("0:16 left")


def test_the_accuracy_by_instance_is_one_line(tmp_path: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    tracker, _ = _console(tmp_path, out, err)
    result = {**EVALUATION, "by_instance": {"1": {"mean": 0.364, "ci95": 0.01}, "2": {"mean": 0.828, "ci95": 0.01}}}
    tracker.log_evaluation(100, result)
    tracker.finish({"evaluation": result}, 0)
    assert err.getvalue().splitlines()[-1].endswith("over 600 episodes; by instance 36.4 82.8 %")
    assert "by instance        36.4 82.8 %" in out.getvalue()


def test_the_table_goes_to_stdout_and_names_what_exists(tmp_path: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    tracker, _ = _console(tmp_path, out, err)
    (tmp_path / "report.html").touch()
    tracker.finish({"evaluation": EVALUATION}, 0)
    rows = dict(line.split("  ", 1) for line in out.getvalue().splitlines())
    assert {k: v.strip() for k, v in rows.items()} == {
        "measure": "accuracy", "before adaptation": "20.1 %", "after adaptation": "95.12 ± 0.52 %", "episodes": "600",
        "BatchNorm": "transductive", "run directory": str(tmp_path), "report": str(tmp_path / "report.html"),
    }  # fmt: skip


def test_a_regression_is_not_shown_in_per_cent(tmp_path: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    tracker, _ = _console(tmp_path, out, err, metric="mean_squared_error")
    tracker.log(1, {"loss": 0.5, "mean_squared_error": 0.5, "pre_adaptation_mean_squared_error": 3.25})
    result = {**EVALUATION, "metric": "mean_squared_error", "pre_adaptation": 3.2, "mean": 0.512345, "ci95": 0.04321}
    tracker.log_evaluation(1, result)
    tracker.finish({"evaluation": result}, 0)
    assert "mean squared error 3.25 → 0.5 " in err.getvalue()
    assert "evaluation of step 1 on test: mean squared error 3.2 → 0.5123 ± 0.043 over 600 episodes" in err.getvalue()
    assert "0.5123 ± 0.043" in out.getvalue() and "%" not in out.getvalue()


def test_a_run_that_failed_gets_no_table(tmp_path: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    tracker, _ = _console(tmp_path, out, err)
    tracker.log(7, STEP)
    tracker.finish({}, 1)
    assert out.getvalue() == ""
    assert f"stopped at step 7 of 100; {tmp_path} keeps it" in err.getvalue()


def test_numbers_that_are_missing_or_null_are_left_out(tmp_path: Path) -> None:
    err = io.StringIO()
    tracker, _ = _console(tmp_path, io.StringIO(), err)
    tracker.log(1, {"loss": None, "accuracy": None})
    assert err.getvalue().splitlines()[1] == "step 1/100  2 workers  0:00 left"


def test_a_terminal_gets_a_bar_and_a_drawn_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    out, err = Terminal(), Terminal()
    tracker, _ = _console(tmp_path, out, err, name="gly[ph]s")
    tracker.log(40, {**STEP, "compute_s": 0.75, "update_s": 0.25})
    tracker.message("worker [bold]1[/bold] joined")
    tracker.finish({"evaluation": EVALUATION}, 0)
    assert " 40/100" in err.getvalue() and "loss 0.250" in err.getvalue() and "62 tasks/s  2 workers" in err.getvalue()
    assert "time: compute 75 %  update 25 %" in err.getvalue()
    assert "worker [bold]1[/bold] joined" in err.getvalue(), "text was read as markup"
    assert "gly[ph]s" in err.getvalue() and "gly[ph]s" in out.getvalue()
    assert "95.12 ± 0.52 %" in out.getvalue() and "┃" not in out.getvalue() and "│" in out.getvalue()
