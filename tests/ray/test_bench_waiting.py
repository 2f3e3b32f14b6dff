"""The benchmark of updates that do not wait: comparisons by hand, its slow worker, and a short run of every side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metadist.tasks.sinusoid import SinusoidTasks
from tools.bench import waiting
from tools.bench.distribution_parts.uneven import UnevenSines
from tools.bench.waiting import Curve


def test_a_curve_is_read_between_its_evaluations() -> None:
    curve = Curve((0.0, 10.0, 30.0), (4.0, 2.0, 1.0), 20)
    assert [curve.at(s) for s in (0.0, 5.0, 10.0, 20.0, 30.0, 99.0)] == [4.0, 3.0, 2.0, 1.5, 1.0, 1.0]


def test_sides_are_compared_seed_by_seed() -> None:
    rows = waiting.rows_of({
        "waits": [Curve((0.0, 20.0), (5.0, 1.0), 10), Curve((0.0, 40.0), (5.0, 3.0), 10)],
        "quorum 7/8": [
            Curve((0.0, 10.0), (5.0, 2.0), 10, left_out=0.125), Curve((0.0, 10.0), (5.0, 3.0), 10, left_out=0.125),
        ],
    })  # fmt: skip
    waits, quorum = rows
    assert waits["ms_per_update"] == 3000 and waits["error"] == 2 and waits["error_less_waits"] == 0
    assert waits["error_at_time"] == pytest.approx((3.0 + 4.5) / 2)  # after the quorum's ten seconds
    assert quorum["ms_per_update"] == 1000 and quorum["error"] == 2.5 and quorum["left_out_percent"] == 12.5
    assert quorum["error_less_waits"] == 0.5 and quorum["standard_error"] == pytest.approx(0.5)
    assert quorum["at_time_less_waits"] == pytest.approx((-1.0 - 1.5) / 2)
    assert quorum["at_time_standard_error"] == pytest.approx(0.25)


def test_one_seed_has_no_standard_error() -> None:
    (row,) = waiting.rows_of({"waits": [Curve((0.0, 20.0), (5.0, 1.0), 10)]})
    assert row["standard_error"] is None and row["at_time_standard_error"] is None


def test_one_process_is_slow_and_only_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("tools.bench.distribution_parts.uneven.time.sleep", waits.append)
    mine = UnevenSines(0.5, 4.0, str(tmp_path / "mine"), shots=3, query_shots=2)
    (tmp_path / "other").write_text("another process")
    others = UnevenSines(0.5, 4.0, str(tmp_path / "other"), shots=3, query_shots=2)
    plain = SinusoidTasks(3, 2)
    for tasks in (mine, others, mine):
        assert tasks.episodes(0, "train", [5]).query.y.equal(plain.episodes(0, "train", [5]).query.y)
        tasks.episodes(0, "evaluation/validation", [5])
    assert waits == [2.0, 0.5, 2.0]
    assert (tmp_path / "other").read_text() == "another process"


@pytest.mark.slow
def test_every_side_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, picture = tmp_path / "found.json", tmp_path / "found.png"
    waiting.main(["--quick", "--json", str(kept), "--picture", str(picture)])
    rows = {row["side"]: row for row in json.loads(kept.read_text())["rows"]}
    assert list(rows) == list(waiting.SIDES)
    assert all(0 < row["error"] < 5 for row in rows.values())
    assert rows["max_staleness 4"]["mean_staleness"] > 0 and rows["max_staleness 4"]["most_stale"] <= 4
    assert 0 < rows["quorum 7/8"]["left_out_percent"] <= 12.5
    assert rows["waits"]["mean_staleness"] == rows["waits"]["left_out_percent"] == 0
    assert picture.stat().st_size > 1000
    assert "seed 0  waits" in capsys.readouterr().out
