"""The adaptation benchmark refuses what is wrong, and counts right, at tiny sizes."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tools.bench import adaptation
from tools.bench.adaptation_parts import measure, peers, report
from tools.bench.adaptation_parts.measure import Implementation, Measured
from tools.bench.adaptation_parts.ours import SETTINGS, make_ours
from tools.bench.adaptation_parts.workloads import WORKLOADS, Call, Job, Workload, make_job, microbatches, reference

SCRIPT = ROOT / "tools" / "bench" / "adaptation.py"
NOWHERE = ROOT / "tests" / "no-such-folder"

_SMALL = {"type": "conv4", "filters": 4, "downsample": "max_pool"}
TINY = {
    "A": replace(WORKLOADS["A5"], shape=(1, 16, 16), queries=2, steps=2, tasks=3, model=_SMALL),
    "B": replace(WORKLOADS["B5"], shape=(1, 16, 16), queries=2, steps=1, tasks=3, model=_SMALL),
    "D": replace(WORKLOADS["D5"], steps=2, tasks=3, model={"type": "mlp", "hidden": [5, 4]}),
    "E": replace(WORKLOADS["E"], shape=(1, 2, 2), shots=2, queries=1, tasks=3),
}


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LEAST_S", 0.002)


def eager(workload: Workload) -> list[Implementation]:
    """What of a workload's implementations needs neither a package of somebody else's nor a compiler."""
    found, _ = measure.implementations(workload, NOWHERE)
    own = {p.name for p in peers.PEERS if not p.package}
    return [i for i in found if (i.ours or i.name in own) and not i.compiled]


@pytest.mark.parametrize("family", TINY)
def test_every_implementation_gives_the_references_gradient_and_a_whole_row(family: str) -> None:
    found = eager(TINY[family])
    result = measure.measure(TINY[family], found, 3, 2)
    assert not result["left_out"] and len(found) >= 2
    assert [r["implementation"] for r in result["rows"]] == [i.name for i in found]
    for row in result["rows"]:
        assert row["workload"] == TINY[family].name and row["rounds"] == 2 and row["tasks"] == 3
        assert row["ms_per_task"] > 0 and row["gflops"] > 0 and 0 < row["share_of_sgemm"] < 1
        assert row["error_float64"] < 1e-10 and row["error_float32"] < 1e-2
        ours = row["implementation"].startswith("metadist/")
        assert (row["ratio_to_fastest_peer"] is not None) == ours
    assert result["attainable_gflops"].keys() == {"sgemm", "conv3x3"}


def test_the_workloads_are_different_problems() -> None:
    job = make_job(TINY["A"], 2, torch.float64)
    first_order = make_job(replace(TINY["B"], steps=TINY["A"].steps), 2, torch.float64)
    assert torch.equal(job.batch.support.x, first_order.batch.support.x)
    assert all(torch.equal(job.params[k], first_order.params[k]) for k in job.params)
    assert measure.distance(reference(first_order), reference(job)) > 0.05
    single = make_job(TINY["A"], 2, torch.float32)
    assert torch.equal(single.batch.query.x.double(), job.batch.query.x.float().double())


def _skewed(job: Job) -> Call:
    right = reference(job)
    return lambda: {k: v * 1.2 for k, v in right.items()}


def _first_order(job: Job) -> Call:
    return lambda: reference(make_job(replace(job.workload, first_order=True), len(job.batch), job.dtype))


def _only_wrong_in_float64(job: Job) -> Call:
    right = reference(job)
    return lambda: {k: v * (1 + 1e-5) for k, v in right.items()}


def _lacks_a_tensor(job: Job) -> Call:
    return lambda: dict(list(reference(job).items())[1:])


@pytest.mark.parametrize("wrong", [_skewed, _first_order, _only_wrong_in_float64, _lacks_a_tensor])
def test_a_wrong_peer_is_reported_and_not_timed(wrong: Any) -> None:
    w = TINY["D"]
    found = [Implementation("wrong", wrong), Implementation("right", lambda job: lambda: reference(job))]
    result = measure.measure(w, found, 3, 1)
    assert [r["implementation"] for r in result["rows"]] == ["right"]
    assert list(result["left_out"]) == ["wrong"]
    assert "WRONG" in result["left_out"]["wrong"] or "other tensors" in result["left_out"]["wrong"]


def test_a_peer_that_is_not_there_is_told_in_a_line_and_the_rest_goes_on() -> None:
    w = TINY["D"]
    found, left_out = measure.implementations(w, NOWHERE)
    assert left_out == {"plain LSTMCell loop": "for sequences"}
    absent = [i for i in found if i.name.startswith("learn2learn")] + eager(w)[:1]
    result = measure.measure(w, absent, 3, 1)
    if "learn2learn" not in sys.modules:
        assert "does not import" in result["left_out"]["learn2learn 0.2.0"]
        assert "\n" not in result["left_out"]["learn2learn 0.2.0"]
    assert result["rows"][-1]["implementation"] == eager(w)[0].name


def test_stand_ins_leave_no_trace_and_stand_for_data_sets_alone(tmp_path: Path) -> None:
    (tmp_path / "peer_of_this_test.py").write_text(
        "from gym.envs.registration import register\nregister(id='x')\nimport h5py\nclass D(h5py.File): pass\n"
    )
    (tmp_path / "other_of_this_test.py").write_text("import not_installed_anywhere\n")
    peers.import_peer(tmp_path, "peer_of_this_test")
    assert "gym.envs" not in sys.modules
    with pytest.raises(ImportError, match="other_of_this_test does not import .*not_installed_anywhere"):
        peers.import_peer(tmp_path, "other_of_this_test")
    sys.path.remove(str(tmp_path))


def test_ratios_are_to_the_fastest_right_peer() -> None:
    def done(name: str, seconds: list[float], ours: bool = False) -> Measured:
        made = Implementation(name, _skewed, ours)
        return Measured(made, rounds_s=[(s, 2 * s) for s in seconds], errors={"float32": 0.0})

    measured = [
        done("slow", [0.4, 0.8, 0.6]),
        done("fast", [0.3, 0.2, 9.0]),
        Measured(Implementation("wrong", _skewed), reason="WRONG"),
        done("metadist/x", [0.1, 0.2, 0.05], ours=True),
    ]
    rows = {r["implementation"]: r for r in measure.rows(TINY["D"], measured, 10, flops=2e6, sgemm=4.0)}
    assert list(rows) == ["slow", "fast", "metadist/x"]
    assert rows["slow"]["ms_per_task"] == pytest.approx(60) and rows["fast"]["ms_per_task"] == pytest.approx(30)
    assert rows["metadist/x"]["ms_per_task"] == pytest.approx(10)
    assert rows["metadist/x"]["ratio_to_fastest_peer"] == pytest.approx(3.0)
    assert rows["slow"]["ratio_to_fastest_peer"] is None
    # Two million operations in 10 ms are 0.2 billion a second, a twentieth of 4.
    assert rows["metadist/x"]["gflops"] == pytest.approx(0.2)
    assert rows["metadist/x"]["share_of_sgemm"] == pytest.approx(0.05)
    assert rows["metadist/x"]["wall_ms_per_task"] == pytest.approx(20)
    alone = measure.rows(TINY["D"], measured[3:], 10, 2e6, 4.0)
    assert alone[0]["ratio_to_fastest_peer"] is None
    assert len(report.cells(rows["slow"])) == len(report.COLUMNS)


def test_rounds_interleave_and_rotate() -> None:
    order: list[str] = []

    def made(name: str) -> Measured:
        def call() -> dict[str, torch.Tensor]:
            order.append(name)
            return {}

        return Measured(Implementation(name, _skewed), call, first_call_s=10.0)

    measured = [made("a"), made("b"), made("c"), Measured(Implementation("wrong", _skewed))]
    measure.time_rounds(measured, 3)
    assert "".join(order) == "abcbcacab"
    assert [len(m.rounds_s) for m in measured] == [3, 3, 3, 0]


def test_tasks_computed_together_are_cut_and_summed() -> None:
    job = make_job(TINY["D"], 5, torch.float64)
    parts = microbatches(job.batch, 2)
    assert [len(p) for p in parts] == [2, 2, 1] and len(microbatches(job.batch, None)[0]) == 5
    assert torch.equal(torch.cat([p.query.y for p in parts]), job.batch.query.y)
    setting = next(s for s in SETTINGS if s.name == "vectorised-all")
    found = make_ours(replace(setting, together=2), job)()
    assert measure.distance(found, reference(job)) < 1e-12


def test_the_table_of_settings_fits_the_config() -> None:
    names = [s.name for s in SETTINGS]
    assert len(set(names)) == len(names)
    for s in SETTINGS:
        assert set(s.on) <= {w.family for w in WORKLOADS.values()} and all(q in WORKLOADS for q in s.quick)
        make_ours(s, make_job(TINY["D"], 1, torch.float32))  # the config refuses what it does not know
    for w in WORKLOADS.values():
        quick, _ = measure.implementations(w, NOWHERE, quick=True)
        assert any(i.ours for i in quick) and any(not i.ours for i in quick), w.name


def peak_mb_of_half_a_gigabyte() -> float:
    def make(job: Job) -> Call:
        return lambda: {"x": torch.ones(512 * 2**20 // 4)}

    return measure.peak_mb(Implementation("takes 512 MB", make), make_job(TINY["D"], 1, torch.float32))


def test_memory_is_what_the_calls_took() -> None:
    # In a process that does nothing else: this one may have been larger, and has given that back since.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert 500 < pool.submit(peak_mb_of_half_a_gigabyte).result() < 700


def test_memory_is_measured_of_each_row_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []

    def in_child(order: dict[str, Any], allocator: str) -> dict[str, Any]:
        orders.append((order.get("memory_of"), order["tasks"], allocator))
        if "memory_of" in order:
            return {"died": "no memory"} if order["memory_of"] == "b" else {"peak_mb": 7.0}
        return {"rows": [{"implementation": "a", "peak_mb": None}, {"implementation": "b", "peak_mb": None}]}

    monkeypatch.setattr(adaptation, "in_child", in_child)
    result = adaptation.run_workload("A1", adaptation.arguments(["--allocator", "default"]))
    assert orders == [(None, 32, "default"), ("a", 32, "default"), ("b", 32, "default")]
    assert [r["peak_mb"] for r in result["rows"]] == [7.0, None]
    orders.clear()
    adaptation.run_workload("A1", adaptation.arguments(["--quick"]))
    assert orders == [(None, WORKLOADS["A1"].quick_tasks, "workers")]


def test_a_process_that_dies_is_a_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(adaptation.sys, "executable", "false")
    result = adaptation.run_workload("A1", adaptation.arguments([]))
    assert result == {"rows": [], "left_out": {"A1": "its process ended with 1"}}
    report.show("A1", result)
    assert "left out: A1: its process ended with 1" in capsys.readouterr().out


def test_it_writes_rows_and_tells_them_in_plain_lines(tmp_path: Path) -> None:
    words = ["--workloads", "D1", "--implementations", "func,vectorised-all,learn2learn", "--tasks", "2", "--no-memory"]
    words += ["--rounds", "1", "--peers", "none", "--json", "out/found.json"]
    done = subprocess.run([sys.executable, SCRIPT, *words], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "found.json").read_text()
    found = json.loads(text)
    assert {r["implementation"] for r in found["rows"]} == {"torch.func recipe", "metadist/vectorised-all"}
    for row in found["rows"]:
        assert {"workload", "implementation", "ms_per_task", "ratio_to_fastest_peer"} <= row.keys()
        assert row["workload"] == "D1" and row["tasks"] == 2
    ours, peer = (next(r for r in found["rows"] if r["implementation"].startswith(n)) for n in ("metadist", "torch"))
    assert ours["ratio_to_fastest_peer"] == pytest.approx(peer["ms_per_task"] / ours["ms_per_task"])
    assert found["setup"]["allocator"].startswith("glibc.malloc.mmap_max=0") and len(found["setup"]["date"]) == 10
    assert "does not import" in found["setup"]["workloads"]["D1"]["left_out"]["learn2learn 0.2.0"]
    assert str(tmp_path) not in text and str(ROOT) not in text, "no paths of the machine it was measured on"
    assert "metadist/vectorised-all\t" in done.stdout and "allocator: glibc" in done.stdout
    assert "left out: learn2learn 0.2.0: learn2learn does not import" in done.stdout


def test_it_explains_itself_and_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        adaptation.arguments(["--help"])
    told = capsys.readouterr().out
    assert end.value.code == 0 and "pip install --no-deps --target .peers" in told
    assert "python tools/bench/adaptation.py --quick" in told and "--child" not in told and str(ROOT) not in told
    with pytest.raises(SystemExit) as end:
        adaptation.arguments(["--workloads", "A9"])
    assert end.value.code == 2 and "no workload is called A9; there are A1, A5" in capsys.readouterr().err


@pytest.mark.slow
def test_growth_with_the_inner_steps_is_measured(tmp_path: Path) -> None:
    kept = tmp_path / "growth.json"
    words = ["--growth", "--workloads", "D1,E", "--implementations", "adjoint", "--json", str(kept)]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=True)
    rows = {row["implementation"]: row for row in json.loads(kept.read_text())["rows"]}
    assert rows.keys() == {"metadist/adjoint-plain"}, done.stderr
    assert 1.0 <= rows["metadist/adjoint-plain"]["copies_a_step"] <= 1.2
    assert all(row["mb_of_10"] > row["mb_of_1"] > 0 for row in rows.values()) and "a step" in done.stdout
