"""The benchmark of the distributed layer compares like with like, and its rows add up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from metadist.worker import Lease, Round
from tests.conftest import ROOT
from tools.bench import step_overhead
from tools.bench.distribution_parts.emulated import EmulatedWorker, gradient, numbers, shapes


def test_models_have_the_size_they_are_named_for() -> None:
    assert numbers("conv4") * 4 / 1e6 == pytest.approx(0.45, abs=0.01)
    assert numbers("100") * 4 / 1e6 == pytest.approx(100, rel=0.03)
    assert sum(int(np.prod(s)) for s in shapes("100")) == numbers("100")


def test_an_emulated_worker_answers_with_the_sums_of_its_microbatches() -> None:
    round = Round("train", 0, "train", "train", 0, 4, 1)
    report, blocks = EmulatedWorker(50, 0.0, None, "cpu").compute(Lease(0, round, 0, 3), [np.zeros(20), np.zeros(30)])  # type: ignore[arg-type]
    assert len(report.metrics["loss"]) == 3
    np.testing.assert_allclose(sum(blocks.values()), gradient(50, 0) + gradient(50, 1) + gradient(50, 2), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_all_sides_agree_and_a_row_is_whole(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(step_overhead, "connect", lambda runtime: False)
    monkeypatch.setattr(step_overhead.ray, "shutdown", lambda: None)
    words = ["--models", "conv4", "--workers", "1", "--rounds", "2", "--turn-s", "0.05", "--shards", "2"]
    step_overhead.main([*words, "--json", str(tmp_path / "out" / "found.json")])
    found = json.loads((tmp_path / "out" / "found.json").read_text())
    (row,) = found["rows"]
    assert {"model_mb", "workers", "ms_per_step", "speedup_over_ray_example"} <= row.keys()
    assert row["workers"] == 1 and row["server_shards"] == 2 and row["model_mb"] == pytest.approx(0.45, abs=0.01)
    assert all(row[k] > 0 for k in row), "the processes of both sides live together here"
    assert "speedup_over_ray_example" in capsys.readouterr().out


class Still:
    """A side that makes no step."""

    def __init__(
        self, model: str, workers: int, shards: int = 1, moved: float = 0.0, equal_shares: bool = False
    ) -> None:
        self.moved, self.closed = moved, False

    def step(self) -> None: ...
    def steps(self, count: int) -> list[float]:
        return [0.0] * count

    def empty_step(self) -> None: ...

    def all_reduce(self, times: int) -> np.ndarray:
        return gradient(numbers("conv4"), 0)[:1000]

    def weights(self) -> np.ndarray:
        return np.full(5, self.moved)

    flat_weights = weights

    def close(self) -> None:
        self.closed = True


def test_a_side_that_computes_something_else_is_not_timed(monkeypatch) -> None:
    made: list[Still] = []

    def side(moved: float):
        return lambda *a, **k: made.append(Still(*a, **k, moved=moved)) or made[-1]

    monkeypatch.setattr(step_overhead, "EmulatedRun", side(0.0))
    monkeypatch.setattr(step_overhead, "Example", side(1e-3))
    for together in (True, False):
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            step_overhead.compare("conv4", 1, 1, 0.01, together=together)
    assert len(made) == 4 and all(s.closed for s in made)


def test_sides_that_do_not_fit_into_memory_together_live_one_after_another(monkeypatch) -> None:
    made: list[Still] = []
    most = [0]

    def side(*a, **k) -> Still:
        made.append(Still(*a, **k))
        most[0] = max(most[0], sum(not s.closed for s in made))
        return made[-1]

    monkeypatch.setattr(step_overhead, "EmulatedRun", side)
    monkeypatch.setattr(step_overhead, "Example", side)
    monkeypatch.setattr(step_overhead, "memory_for_both", lambda model, workers: False)
    row = step_overhead.compare("conv4", 1, 3, 0.01)
    assert row["together"] == 0 and most[0] == 1 and len(made) == 2 * 3 and all(s.closed for s in made)


def test_sides_take_turns() -> None:
    order: list[str] = []
    sides = {name: lambda n, name=name: order.append(name * n) for name in "ab"}
    found = step_overhead.in_turns(sides, 3, 0.0)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" and all(len(times) == 3 for times in found.values())


def test_what_a_run_spends_between_its_workers_is_told() -> None:
    lines = [{"step_s": s, "worker_s": {"0": 0.5, "1": c}} for s, c in ((1.0, 0.9), (2.0, 1.9), (4.0, 3.0))]
    row = step_overhead.layer_of(lines)
    assert row["steps"] == 3 and row["ms_per_step"] == 2000 and row["computed_ms"] == 1900
    assert row["layer_ms"] == pytest.approx(100) and row["layer_part"] == pytest.approx(0.1)


@pytest.mark.slow
def test_a_run_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    step_overhead.main(["--run", str(ROOT / "configs" / "sinusoid_maml.yaml"), "--steps", "5"])
    columns, row = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    told = dict(zip(columns, row, strict=True))
    assert told["config"] == "sinusoid_maml" and told["steps"] == "5" and 0 < float(told["layer_part"]) < 1


def test_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step_overhead.arguments(["--help"])
    assert "python tools/bench/step_overhead.py --quick" in capsys.readouterr().out
    assert step_overhead.arguments(["--quick"]).workers == [4]
