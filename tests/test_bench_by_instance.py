"""The picture of the accuracy by instance comes from the runs that are named, and says what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench.by_instance import draw, rows


def test_numbers_and_picture(tmp_path: Path) -> None:
    shown = {str(n): {"mean": 0.2 * n, "ci95": 0.01} for n in (1, 2, 3)}
    for name in ("mann", "lstm"):
        (tmp_path / name).mkdir()
        summary = {"evaluation": {"split": "test", "episodes": 600, "by_instance": shown}}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    found = rows([tmp_path / "mann", tmp_path / "lstm"])
    assert [r["run"] for r in found] == ["mann", "lstm"] and found[0]["by_instance"] == shown
    draw(found, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_instances_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nowhere: has no evaluation by instance"):
        rows([tmp_path / "nowhere"])
    (tmp_path / "maml").mkdir()
    (tmp_path / "maml" / "summary.json").write_text('{"evaluation": {"split": "test", "episodes": 600}}')
    with pytest.raises(SystemExit, match="by_instance"):
        rows([tmp_path / "maml"])
