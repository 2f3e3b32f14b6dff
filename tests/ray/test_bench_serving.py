"""The benchmark of serving runs at a small size and refuses answers that are not the learner's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tools.bench import serving

SCRIPT = ROOT / "tools" / "bench" / "serving.py"


@pytest.mark.slow
def test_it_writes_rows_and_tells_what_batching_gains(tmp_path: Path) -> None:
    words = ["--requests", "40", "--clients", "4", "--json", str(tmp_path / "out" / "rows.json")]
    command = [sys.executable, str(SCRIPT), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())["rows"]
    assert [r["what"] for r in rows] == ["adapt, together", "predict, one by one", "predict, together"]
    assert all(0 < r["p50_ms"] <= r["p99_ms"] and r["per_s"] > 0 for r in rows)
    assert "times as many predictions a second as one by one" in done.stdout


def test_other_answers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Learner:
        def adapt(self, support: object) -> torch.nn.Module:
            return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))

    import numpy as np

    monkeypatch.setattr(serving.md, "load", lambda run_dir: Learner())
    pictures = [np.full((2, 2), v, np.uint8) for v in (0, 200)]
    told = {"predictions": [{"probabilities": {"a": 2.0, "b": -1.0}}] * 2}
    with pytest.raises(SystemExit, match="answers otherwise than the learner"):
        serving.compare(Path("run"), [("a", pictures[0]), ("b", pictures[1])], pictures, told)


def test_it_explains_itself_with_an_example() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "example: python tools/bench/serving.py" in done.stdout
