"""The benchmark of a large model's memory: every kind of process is seen, and its rows are in copies of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench import large_model


@pytest.mark.slow
def test_every_kind_of_process_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large_model.main(["--quick", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["what"]: row["processes"] for row in found["rows"]} == {
        "driver": 1, "server shards": 4, "worker": 2, "areas": 1, "object store": 1,
    }  # fmt: skip
    for row in found["rows"]:
        assert row["copies"] * 4e7 == pytest.approx(row["peak_gb"] * 1e9)
        assert row["peak_gb"] * 1e9 > 4e7, "less than a copy of the parameters"
    assert found["setup"]["most_gb"] > max(row["peak_gb"] for row in found["rows"])
    assert "3 steps" in capsys.readouterr().out
