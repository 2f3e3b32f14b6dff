"""Promise P1: the bits of a run do not depend on where, by how many and with which interruptions it is computed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from metadist.cli import main
from metadist.outer import gradient
from tests.conftest import ROOT

STEPS = 20


def words(shards: Path, **changes: object) -> list[str]:
    base = {
        "tasks.path": shards, "outer.steps": STEPS, "engine.compile": "false", "evaluation.episodes": 50,
        "tracking.wandb.mode": "disabled", "tracking.console": "false", "checkpoint.every": 5,
        "outer.meta_batch_size": 16, "outer.tasks_per_microbatch": 2, "model.filters": 16,
        "outer.schedule": "constant",
    }  # fmt: skip
    return [f"{k}={v}" for k, v in {**base, **changes}.items()]


def command(shards: Path, run_dir: Path, **changes: object) -> list[str]:
    config = ROOT / "configs" / "omniglot_5way1shot_maml.yaml"
    return [
        sys.executable,
        "-m",
        "metadist.cli",
        "train",
        str(config),
        *words(shards, **changes),
        "--run-dir",
        str(run_dir),
    ]


def run(shards: Path, run_dir: Path, **changes: object) -> dict:
    subprocess.run(command(shards, run_dir, **changes), check=True, timeout=240, cwd=ROOT)
    return json.loads((run_dir / "summary.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(omniglot_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[str]]:
    run_dir = tmp_path_factory.mktemp("p1") / "local"
    summary = run(omniglot_shards, run_dir, **{"runtime.type": "local"})
    return summary, numbers(run_dir)


def numbers(run_dir: Path) -> list[str]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        json.dumps({k: x[k] for k in ("version", "loss", "accuracy", "pre_adaptation_loss", "grad_norm")})
        for x in lines
    ]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_ray_gives_the_bits_of_one_process(omniglot_shards, undisturbed, tmp_path, workers):
    summary = run(omniglot_shards, tmp_path / "run", **{"runtime.type": "ray", "runtime.workers": workers})
    assert summary["meta_params_sha256"] == undisturbed[0]["meta_params_sha256"]
    assert summary["evaluation"] == undisturbed[0]["evaluation"]
    assert numbers(tmp_path / "run") == undisturbed[1]


def test_a_killed_and_resumed_run_gives_the_same_bits(omniglot_shards, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    # Slow enough to be caught in the middle, and killed without a chance to tidy up.
    process = subprocess.Popen(command(omniglot_shards, run_dir, **{"runtime.type": "local"}), cwd=ROOT)
    wait_for_step(run_dir, 9, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run_dir / "summary.json").exists(), "the kill came too late to test anything"
    subprocess.run(
        [sys.executable, "-m", "metadist.cli", "resume", str(run_dir), "runtime.type=ray", "runtime.workers=2"],
        check=True,
        timeout=240,
        cwd=ROOT,
    )
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["meta_params_sha256"] == undisturbed[0]["meta_params_sha256"]
    assert summary["restarts"]["driver"] == 1
    assert numbers(run_dir) == undisturbed[1], "a line of metrics.jsonl is missing, doubled or different"


def test_a_worker_killed_in_the_middle_changes_nothing(omniglot_shards, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        command(omniglot_shards, run_dir, **{"runtime.type": "ray", "runtime.workers": 2}), cwd=ROOT
    )
    wait_for_step(run_dir, 3, process)
    os.kill(a_worker_of(process.pid), signal.SIGKILL)
    assert process.wait(timeout=240) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["restarts"]["worker"] == 1, "the fault was not seen to fire"
    assert summary["meta_params_sha256"] == undisturbed[0]["meta_params_sha256"]


def test_ctrl_c_leaves_a_run_that_resumes_to_the_same_bits(omniglot_shards, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(command(omniglot_shards, run_dir, **{"runtime.type": "local"}), cwd=ROOT)
    wait_for_step(run_dir, 3, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    stopped_at = int((run_dir / "checkpoints" / "latest").read_text())
    assert stopped_at == len(numbers(run_dir)) < STEPS
    subprocess.run([sys.executable, "-m", "metadist.cli", "resume", str(run_dir)], check=True, timeout=240, cwd=ROOT)
    assert (
        json.loads((run_dir / "summary.json").read_text())["meta_params_sha256"] == undisturbed[0]["meta_params_sha256"]
    )


def test_the_check_notices_another_order_of_summation(omniglot_shards, undisturbed, tmp_path, monkeypatch):
    def in_order_of_arrival(start, values, count):
        total = None
        for value in values:
            total = value.copy() if total is None else value + total * np.float32(1)
        # One block over everything, summed from left to right instead of by the tree.
        return {gradient.Block((count - 1).bit_length(), 0): total}

    monkeypatch.setattr("metadist.worker.partial_sums", in_order_of_arrival)
    assert in_process(omniglot_shards, tmp_path)["meta_params_sha256"] != undisturbed[0]["meta_params_sha256"]


def test_the_check_notices_another_seeding(omniglot_shards, undisturbed, tmp_path, monkeypatch):
    from metadist.worker import Round

    monkeypatch.setattr(
        Round, "episodes", lambda self, m: range(m * self.tasks_per_microbatch, (m + 1) * self.tasks_per_microbatch)
    )
    assert in_process(omniglot_shards, tmp_path)["meta_params_sha256"] != undisturbed[0]["meta_params_sha256"]


@pytest.mark.parametrize("forgets", [False, True], ids=["whole state", "forgotten optimizer state"])
def test_the_check_notices_a_forgotten_optimizer_state(omniglot_shards, undisturbed, tmp_path, monkeypatch, forgets):
    from metadist.outer.update import MetaUpdate

    in_process(omniglot_shards, tmp_path, until=9)
    if forgets:
        load = MetaUpdate.load
        monkeypatch.setattr(MetaUpdate, "load", lambda self, vector, state, version: load(self, vector, {}, version))
    invoke(["resume", str(tmp_path / "run"), f"outer.steps={STEPS}"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["meta_params_sha256"] != undisturbed[0]["meta_params_sha256"]) == forgets


def in_process(shards: Path, tmp_path: Path, until: int = STEPS) -> dict:
    config = str(ROOT / "configs" / "omniglot_5way1shot_maml.yaml")
    invoke(
        [
            "train",
            config,
            *words(shards, **{"runtime.type": "local", "outer.steps": until}),
            "--run-dir",
            str(tmp_path / "run"),
        ]
    )
    return json.loads((tmp_path / "run" / "summary.json").read_text())


def invoke(arguments: list[str]) -> None:
    from click.testing import CliRunner

    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    metrics = run_dir / "metrics.jsonl"
    for _ in range(4000):
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
            return
        assert process.poll() is None, "the run ended before the fault could be injected"
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came")


def a_worker_of(driver: int) -> int:
    """The process of one Ray worker that computes for ``driver``."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    parent = {pid: ppid for pid, ppid, _ in rows}

    def descends(pid: str) -> bool:
        while pid in parent and pid != str(driver):
            pid = parent[pid]
        return pid == str(driver)

    found = [int(pid) for pid, _, args in rows if "ray::_Worker" in args and descends(pid)]
    assert found, "no worker process was found"
    return found[0]
