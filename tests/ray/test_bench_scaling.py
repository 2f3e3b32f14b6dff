"""The scaling benchmark: what its predictions are of, its two parts at small sizes, and the check of the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from metadist.simulator import Costs, PlainPace
from tools.bench import scaling
from tools.bench.distribution_parts.calibration import Measured, costs_of

CPU_SECONDS = """
import json, subprocess, sys
from tools.bench.distribution_parts.calibration import cpu_seconds

BUSY = "import time\\nwhile time.process_time() < 0.25: pass\\nprint('done', flush=True); time.sleep(60)"
before = cpu_seconds()
subprocess.run([sys.executable, "-c", "while __import__('time').process_time() < 0.2: pass"], check=True)
ended = cpu_seconds()
child = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
child.stdout.readline()
during = cpu_seconds()
child.kill()
print(json.dumps([before, ended, during]))
"""


ROOT = Path(__file__).resolve().parents[2]


def measured(workers: int, driver: float, worker: float, server: float, services: float) -> Measured:
    return Measured(workers, 0.3, {"driver": driver, "worker": worker, "server": server, "services": services})


def test_costs_are_what_grows_with_the_workers_and_what_does_not() -> None:
    few, many = measured(2, 0.009, 0.008, 0.005, 0.020), measured(12, 0.029, 0.060, 0.015, 0.040)
    cut = measured(12, 0.029 + 0.036, 0.060 + 0.018, 0.5, 0.040 + 0.018)
    costs = costs_of(few, many, cut, message_s=0.25)
    assert (costs.lease_s, costs.answer_s, costs.step_s) == pytest.approx((0.001, 0.001, 0.005))
    # A worker's 4 ms with one other, 5 ms with eleven: a tenth more for each. What Ray runs beside the workers is part
    # of a lease as far as it grows with them.
    assert costs.crowd_s == pytest.approx(0.0001)
    assert (costs.worker_s, costs.add_s, costs.commit_s) == pytest.approx((0.0039 + 0.002, 0.001, 0.003))
    # Three shards more, for each of twelve workers.
    assert (costs.part_s, costs.worker_part_s, costs.message_s) == pytest.approx((0.001, 0.001, 0.25))
    # A noisy machine: nothing costs less than nothing.
    noise = costs_of(few, measured(12, 0.001, 0.001, 0.001, 0.001))
    assert noise.lease_s == noise.crowd_s == 0.0


def test_cpu_seconds_are_those_of_this_process_and_of_what_it_started() -> None:
    # In a process of its own: this one may have others yet, that end meanwhile.
    told = subprocess.run([sys.executable, "-c", CPU_SECONDS], capture_output=True, text=True, check=True, cwd=ROOT)
    before, ended, during = json.loads(told.stdout)
    assert during["services"] - ended["services"] >= 0.2  # to a tick of a hundredth
    assert during["driver"] >= ended["driver"] >= before["driver"] > 0


def test_a_prediction_adds_the_costs_to_the_wait() -> None:
    assert scaling.predicted_step(4, 0.2, Costs()) == pytest.approx(0.2, abs=2e-3)
    few, many = (scaling.predicted_step(n, 0.2, Costs(worker_s=0.05)) for n in (4, 64))
    assert 0.2 < few < many


def test_plain_steps_share_equally_and_wait() -> None:
    pace = PlainPace(600.0)
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
