"""tools/bench/choice.py: the choice is judged by what was timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "tools" / "bench" / "choice.py"


@pytest.mark.slow
def test_the_choice_is_among_what_was_timed(tmp_path: Path) -> None:
    kept = tmp_path / "rows.json"
    command = [sys.executable, str(BENCH), "--quick", "--workloads", "D1", "--json", str(kept)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(kept.read_text())["rows"]
    timed = row["ms_per_task"]
    assert {row["by_hand"], row["written"], row["auto"]} <= set(timed)
    assert row["by_hand"] == min(timed, key=timed.get)
    assert row["auto"] == "vectorised, traced, direct convolutions, 25 together"
    assert row["auto_ratio"] > 0.5 and row["written_ratio"] > 0.5 and row["ways"] >= 8
    assert done.stdout.splitlines()[0].split("\t")[0] == "workload"


def test_a_workload_that_does_not_exist_is_named() -> None:
    command = [sys.executable, str(BENCH), "--workloads", "Z9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no workload Z9; there are A1," in done.stderr
