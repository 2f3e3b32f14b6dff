"""The table and the picture of what the simulator says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metadist.simulator.presets import GPU_10G
from tools.bench import simulate


def test_it_prints_draws_and_keeps_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, drawn = tmp_path / "found.json", tmp_path / "found.png"
    words = ["--workers", "8", "16", "--model-mb", "0.5", "500", "--json", str(kept), "--picture", str(drawn)]
    simulate.main(words)
    found = json.loads(kept.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    rows = found["rows"]
    assert [(r["model_mb"], r["workers"]) for r in rows] == [(0.5, 8), (0.5, 16), (500.0, 8), (500.0, 16)]
    for row in rows:
        assert sum(row["split_ms"].values()) == pytest.approx(row["ms_per_step"])
        least = min(ms for words, ms in row["choices_ms"].items() if words != "topology: allreduce_unordered")
        assert least <= row["best_ms"] <= 1.05 * least and 0 < row["efficiency"] <= 1
    assert rows[0]["binds"] == "compute" and rows[3]["best"] != "server_shards: 1"
    # One of sixteen is three times slower: who waits for it takes at least three times as long as it takes to compute.
    assert rows[1]["wait_for_all_ms"] > 2400 > rows[1]["leased_twice_ms"] > rows[1]["unwaiting_ms"]
    assert found["setup"]["cluster"]["source"] == GPU_10G.source
    assert "assumed" in capsys.readouterr().out and drawn.read_bytes().startswith(b"\x89PNG")


def test_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        simulate.arguments(["--help"])
    assert "python tools/bench/simulate.py --quick" in capsys.readouterr().out
    assert simulate.arguments(["--quick"]).workers == [8, 64]
    assert simulate.finite({"a": float("inf"), "b": {"c": 1.0}}) == {"a": None, "b": {"c": 1.0}}
