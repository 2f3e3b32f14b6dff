"""When a person is woken, and when not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from metadist.tracking.watch import WINDOW, Alert, Watch


def _watched(steps: Iterable[dict[str, Any]], watch: Watch | None = None) -> list[Alert]:
    watch = watch or Watch(clock=lambda: 0.0)
    return [alert for step in steps for alert in watch.step(step)]


def _steps(*losses: float, **parts: float) -> list[dict[str, Any]]:
    return [{"loss": loss, "step_s": 1.0, **parts} for loss in losses for _ in range(WINDOW)]


def test_a_loss_far_above_its_best_is_told_of_once() -> None:
    (alert,) = _watched(_steps(1.6, 0.2, 0.1, 1.2, 5.0))
    assert alert.title == "diverging" and "was 0.1 at its best; lower outer.lr" in alert.text


def test_noise_and_a_plateau_are_not() -> None:
    assert _watched(_steps(1.6, 0.1, 0.19, 0.1)) == [], "doubled, but little of the gain is lost"
    assert _watched(_steps(3.0, 2.0, 2.6)) == [], "more than half of the gain is lost, but it has not doubled"
    assert _watched([{"loss": 1e-6, "step_s": 1.0}] * (WINDOW - 1) + [{"loss": 9.0, "step_s": 1.0}] * 0) == []


def test_a_loss_that_never_fell_is_told_of_when_it_has_doubled() -> None:
    assert _watched(_steps(1.0, 1.5)) == []
    assert [a.title for a in _watched(_steps(1.0, 2.5))] == ["diverging"]


def test_workers_that_wait_for_data_or_for_work_are_told_of() -> None:
    (data,) = _watched(_steps(1.0, data_s=0.6, wait_s=0.2))
    assert data.title == "workers wait for data" and "for 60% of the time" in data.text and "window" in data.text
    (work,) = _watched(_steps(1.0, data_s=0.2, wait_s=0.7))
    assert work.title == "workers wait for work" and "fewer workers" in work.text
    assert _watched(_steps(1.0, data_s=0.5, wait_s=0.5)) == []


def test_an_alert_comes_again_only_after_a_while() -> None:
    now = 0.0
    watch = Watch(again_s=100.0, clock=lambda: now)
    assert len(_watched(_steps(1.0, 1.0, wait_s=0.9), watch)) == 1
    now = 99.0
    assert _watched(_steps(1.0, wait_s=0.9), watch) == []
    now = 100.0
    assert len(_watched(_steps(1.0, wait_s=0.9), watch)) == 1


def test_after_a_rewind_it_begins_anew() -> None:
    watch = Watch()
    assert _watched(_steps(1.6, 0.1), watch) == []
    watch.rewind()
    assert _watched(_steps(1.6), watch) == [], "the loss of an earlier step is not a divergence"
