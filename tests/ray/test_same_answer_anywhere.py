"""Promise P1: the bits of a run do not depend on where, by how many and with which interruptions it is computed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from metadist.cli import main
from metadist.outer import gradient
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("no_pictures")

STEPS = 20
LOCAL = {"runtime.type": "local"}


def words(shards: Path, **changes: object) -> list[str]:
    base = {
        "tasks.path": shards, "outer.steps": STEPS, "engine.compile": "false", "evaluation.episodes": 20,
        "tracking.wandb.mode": "disabled", "tracking.console": "false", "checkpoint.every": 5,
        "outer.meta_batch_size": 16, "outer.tasks_per_microbatch": 2, "model.filters": 8,
        "outer.schedule": "constant",
    }  # fmt: skip
    return [f"{k}={v}" for k, v in {**base, **changes}.items()]


CONFIG = str(ROOT / "configs" / "omniglot_5way1shot_maml.yaml")


def started(shards: Path, run_dir: Path, **changes: object) -> subprocess.Popen:
    """A run in a process of its own."""
    command = [sys.executable, "-m", "metadist.cli", "train", CONFIG, *words(shards, **changes)]
    return subprocess.Popen([*command, "--run-dir", str(run_dir)], cwd=ROOT)


def run(shards: Path, run_dir: Path, **changes: object) -> dict:
    """A run in this process."""
    invoke(["train", CONFIG, *words(shards, **changes), "--run-dir", str(run_dir)])
    return json.loads((run_dir / "summary.json").read_text())


def invoke(arguments: list[str]) -> None:
    from click.testing import CliRunner

    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def undisturbed(omniglot_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[str]]:
    run_dir = tmp_path_factory.mktemp("p1") / "local"
    summary = run(omniglot_shards, run_dir, **LOCAL)
    return summary, numbers(run_dir)


def numbers(run_dir: Path) -> list[str]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        json.dumps({k: x[k] for k in ("version", "loss", "accuracy", "pre_adaptation_loss", "grad_norm")})
        for x in lines
    ]


@pytest.mark.parametrize(
    ("workers", "shards", "node_sums"), [pytest.param(1, 1, False, marks=pytest.mark.slow), (2, 4, False), (3, 2, True)]
)
@pytest.mark.usefixtures("cluster")
def test_ray_gives_the_bits_of_one_process(omniglot_shards, undisturbed, tmp_path, workers, shards, node_sums):
    many = {"runtime.type": "ray", "runtime.workers": workers, "runtime.server_shards": shards}
    many["runtime.node_sums"] = node_sums
    summary = run(omniglot_shards, tmp_path / "run", **many)
    assert summary["runtime"]["server_shards"] == shards
    assert summary["meta_params_sha256"] == undisturbed[0]["meta_params_sha256"]
    assert summary["evaluation"] == undisturbed[0]["evaluation"]
    assert numbers(tmp_path / "run") == undisturbed[1]


@pytest.mark.usefixtures("cluster")
def test_a_killed_and_resumed_run_gives_the_same_bits(omniglot_shards, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    # Slow enough to be caught in the middle, and killed without a chance to tidy up.
    process = started(omniglot_shards, run_dir, **LOCAL)
    wait_for_step(run_dir, 7, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run_dir / "summary.json").exists(), "the kill came too late to test anything"
    # By another number of workers and of shards than wrote the checkpoint.
    invoke(["resume", str(run_dir), "runtime.type=ray", "runtime.workers=2", "runtime.server_shards=3"])
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["meta_params_sha256"] == undisturbed[0]["meta_params_sha256"]
    assert summary["restarts"]["driver"] == 1
    assert numbers(run_dir) == undisturbed[1], "a line of metrics.jsonl is missing, doubled or different"


@pytest.mark.parametrize(
    "fault", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)], ids=["killed", "stopped"]
)
@pytest.mark.usefixtures("cluster")
def test_a_worker_lost_in_the_middle_changes_nothing(omniglot_shards, undisturbed, tmp_path, fault):
    run_dir = tmp_path / "run"
    two = {"runtime.type": "ray", "runtime.workers": 2}
    # What has stopped is taken over by the other one, so it is missed only after some more steps.
    stopped = {"outer.steps": 400, "runtime.lease_timeout_s": 3} if fault == signal.SIGSTOP else {}
    with a_worker_struck(run_dir, 3, fault) as lost:
        summary = run(omniglot_shards, run_dir, **two, **stopped)
    assert lost and summary["restarts"]["worker"] == 1, "the fault was not seen to fire"
    if fault == signal.SIGKILL:
        assert summary["meta_params_sha256"] == undisturbed[0]["meta_params_sha256"]
    else:
        assert numbers(run_dir)[:STEPS] == undisturbed[1] and summary["releases"] >= 1
        assert not alive(lost[0]), "a stopped process is ended, or it would keep its memory and its GPU"


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_ctrl_c_leaves_a_run_that_resumes_to_the_same_bits(omniglot_shards, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    process = started(omniglot_shards, run_dir, **LOCAL)
    wait_for_step(run_dir, 3, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    stopped_at = int((run_dir / "checkpoints" / "latest").read_text())
    assert stopped_at == len(numbers(run_dir)) < STEPS
    invoke(["resume", str(run_dir)])
    assert (
        json.loads((run_dir / "summary.json").read_text())["meta_params_sha256"] == undisturbed[0]["meta_params_sha256"]
    )


@pytest.mark.slow
def test_the_check_notices_another_order_of_summation(omniglot_shards, undisturbed, tmp_path, monkeypatch):
    def in_order_of_arrival(start, values, count):
        total = None
        for value in values:
            total = value.copy() if total is None else value + total * np.float32(1)
        # One block over everything, summed from left to right instead of by the tree.
        return {gradient.Block((count - 1).bit_length(), 0): total}

    monkeypatch.setattr("metadist.worker.partial_sums", in_order_of_arrival)
    assert run(omniglot_shards, tmp_path / "run", **LOCAL)["meta_params_sha256"] != undisturbed[0]["meta_params_sha256"]


@pytest.mark.slow
def test_the_check_notices_another_seeding(omniglot_shards, undisturbed, tmp_path, monkeypatch):
    from metadist.worker import Round

    monkeypatch.setattr(
        Round, "episodes", lambda self, m: range(m * self.tasks_per_microbatch, (m + 1) * self.tasks_per_microbatch)
    )
    assert run(omniglot_shards, tmp_path / "run", **LOCAL)["meta_params_sha256"] != undisturbed[0]["meta_params_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("forgets", [False, True], ids=["whole state", "forgotten optimizer state"])
def test_the_check_notices_a_forgotten_optimizer_state(omniglot_shards, undisturbed, tmp_path, monkeypatch, forgets):
    from metadist.outer.update import MetaUpdate

    run(omniglot_shards, tmp_path / "run", **LOCAL, **{"outer.steps": 9})
    if forgets:
        load = MetaUpdate.load
        monkeypatch.setattr(MetaUpdate, "load", lambda self, vector, state, version: load(self, vector, {}, version))
    invoke(["resume", str(tmp_path / "run"), f"outer.steps={STEPS}"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["meta_params_sha256"] != undisturbed[0]["meta_params_sha256"]) == forgets


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen | None = None) -> None:
    metrics = run_dir / "metrics.jsonl"
    for _ in range(4000):
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
            return
        assert process is None or process.poll() is None, "the run ended before the fault could be injected"
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came")


@contextlib.contextmanager
def a_worker_struck(run_dir: Path, step: int, fault: int = signal.SIGKILL) -> Iterator[list[int]]:
    """A worker of this process gets a signal when a step is made; its process, once it has."""
    struck: list[int] = []

    def strike() -> None:
        wait_for_step(run_dir, step)
        struck.append(a_worker_of(os.getpid()))
        os.kill(struck[0], fault)

    striker = threading.Thread(target=strike)
    striker.start()
    try:
        yield struck
    finally:
        striker.join()


def a_worker_of(driver: int) -> int:
    """The process of one Ray worker that computes for ``driver``."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    parent = {pid: ppid for pid, ppid, _ in rows}

    def descends(pid: str) -> bool:
        while pid in parent and pid != str(driver):
            pid = parent[pid]
        return pid == str(driver)

    kinds = ("ray::_Worker", "ray::_Member")
    found = [int(pid) for pid, _, args in rows if args.startswith(kinds) and descends(pid)]
    assert found, "no worker process was found"
    return found[0]
