"""The scaling benchmark: its simulation, its two parts at small sizes, and the check of the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench import scaling
from tools.bench.distribution_parts.simulator import Costs, simulated_step


def test_the_simulation_is_exact_where_the_answer_is_known() -> None:
    free = Costs(0.0, 0.0)
    assert simulated_step(16, 0.2, free) == pytest.approx(0.2)
    # One worker: half a message out, the microbatch, half a message back, the commit.
    assert simulated_step(1, 0.2, Costs(0.01, 0.004)) == pytest.approx(0.2 + 0.004 + 0.01)
    # Nothing to compute: messages alone.
    assert simulated_step(8, 0.0, Costs(0.01, 0.004)) == pytest.approx(8 * 0.004 + 0.01)
    # Leases go out half a message apart, and so the answers come back: all but the last are taken in time.
    assert simulated_step(8, 0.2, Costs(0.0, 0.004)) == pytest.approx(8 * 0.002 + 0.2 + 0.002)


def test_constants_come_from_two_measurements() -> None:
    made = Costs.of((2, 0.014), (8, 0.038))
    assert (made.fixed, made.message) == (pytest.approx(0.006), pytest.approx(0.004))
    assert Costs.of((2, 0.02), (8, 0.01)).message == 0.0


def test_plain_steps_share_equally_and_wait() -> None:
    pace = scaling.PlainPace(600.0)
    for _ in range(2):
        pace.note("train", 0, 1, 0.1)
        pace.note("train", 1, 1, 0.5)
    assert pace.shares("train", 5, [0, 1]) == [3, 2] and pace.patience("train", 1) == 600.0


@pytest.mark.slow
def test_both_parts_run(tmp_path: Path) -> None:
    words = ["--workers", "1", "2", "--steps", "3", "--seconds", "0.1", "--json", str(tmp_path / "found.json")]
    # In a process of its own: it starts a larger cluster than the other tests share.
    command = [sys.executable, scaling.__file__, *words]
    told = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True).stdout
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [r["workers"] for r in rows] == [1, 2, 8, 8]
    assert all(0 < r["efficiency"] <= 1 for r in rows[:2]) and rows[2]["ratio_to_plain"] < 0.8
    assert "straggler" in told


def test_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.arguments(["--help"])
    assert "python tools/bench/scaling.py --quick" in capsys.readouterr().out
    assert scaling.arguments(["--quick"]).workers == [1, 4, 8]
