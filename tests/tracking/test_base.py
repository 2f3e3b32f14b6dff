"""Starting fails loudly; a failing log call never ends a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from metadist.errors import TrackingError
from metadist.tracking import RunInfo, Tracker, Trackers


class Recorder(Tracker):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, run: RunInfo) -> None:
        self.calls.append(("start", run.name))

    def log(self, version: int, metrics: Mapping[str, Any]) -> None:
        self.calls.append(("log", version, dict(metrics)))

    def log_evaluation(self, version: int, result: Mapping[str, Any]) -> None:
        self.calls.append(("evaluation", version, dict(result)))

    def log_picture(self, name: str, path: Path) -> None:
        self.calls.append(("picture", name, path))

    def message(self, text: str) -> None:
        self.calls.append(("message", text))

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        self.calls.append(("finish", dict(summary), exit_code))


class BrokenTracker(Tracker):
    """Starts, then fails at everything."""

    def _fail(self, *_: object) -> None:
        raise OSError("disk full")

    log = log_evaluation = log_picture = message = finish = _fail  # type: ignore[assignment]


class NeverTracker(Tracker):
    def start(self, run: RunInfo) -> None:
        raise OSError("no route to host")


RUN = RunInfo(Path("."), name="r")


def test_all_members_are_told_everything_in_order() -> None:
    members = [Recorder(), Recorder()]
    trackers = Trackers(members)
    trackers.start(RUN)
    trackers.log(1, {"loss": 1})
    trackers.log_evaluation(1, {"mean": 0.5})
    trackers.log_picture("episodes", Path("a.png"))
    trackers.message("hello")
    trackers.finish({"version": 1}, 0)
    assert members[0].calls == members[1].calls == [
        ("start", "r"), ("log", 1, {"loss": 1}), ("evaluation", 1, {"mean": 0.5}),
        ("picture", "episodes", Path("a.png")), ("message", "hello"), ("finish", {"version": 1}, 0),
    ]  # fmt: skip


def test_a_failing_tracker_is_reported_once_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    trackers = Trackers([BrokenTracker(), recorder])
    trackers.start(RUN)
    with caplog.at_level(logging.WARNING):
        trackers.log(1, {})
        trackers.log(2, {})
        trackers.message("x")
        trackers.log_evaluation(2, {})
        trackers.finish({}, 0)
    assert [call[0] for call in recorder.calls] == ["start", "log", "log", "message", "evaluation", "finish"]
    assert [r.getMessage() for r in caplog.records] == [
        "tracking.broken: log failed (OSError: disk full); the run goes on, and later failures of it are not reported"
    ]


def test_a_tracker_that_cannot_start_ends_the_run_and_closes_the_others() -> None:
    before, after = Recorder(), Recorder()
    with pytest.raises(TrackingError, match=r"^tracking\.never: cannot be started \(OSError: no route to host\)$"):
        Trackers([before, NeverTracker(), after]).start(RUN)
    assert before.calls == [("start", "r"), ("finish", {}, 1)]
    assert after.calls == []


def test_stopping_by_hand_is_not_swallowed() -> None:
    class Interrupted(Tracker):
        def log(self, version: int, metrics: Mapping[str, Any]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers([Interrupted()]).log(1, {})
