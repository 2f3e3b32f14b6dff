"""The server's benchmark runs, and notices a sum or an update that is not what it should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metadist.outer.vectors import ADD, Addends
from tools.bench import server


def test_rows_are_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.main(["--quick", "--json", str(tmp_path / "server.json")])
    kept = json.loads((tmp_path / "server.json").read_text())
    assert [row["pass"] for row in kept["rows"]] == ["sum", "update"]
    assert all(row["share"] == pytest.approx(row["gb_per_s"] / row["memory_gb_per_s"]) for row in kept["rows"])
    assert "megabytes_moved" in capsys.readouterr().out and kept["setup"]["parameters"] == 1_000_000


def test_another_order_of_the_sum_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    left_to_right = [0, *(word for m in range(1, server.VECTORS) for word in (m, ADD))]
    monkeypatch.setattr(server, "as_held", lambda vectors: Addends(left_to_right, vectors))
    with pytest.raises(AssertionError, match="bits of the tree"):
        server.check(1000)
