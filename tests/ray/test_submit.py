"""`metadist submit` against a Ray head on this machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import ROOT


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def head(tmp_path):
    """A Ray head of its own: started, waited for, and stopped without touching any other on the machine."""
    port, dashboard = free_port(), free_port()
    binaries = str(Path(sys.executable).parent)
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    # Every port its own: another Ray may be running on this machine.
    flags = {
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "node-ip-address": "127.0.0.1",
        "num-cpus": 3,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [f"{binaries}/ray", "start", "--head", "--block", "--disable-usage-stats", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{dashboard}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=2).read()
            break
        except OSError:
            assert process.poll() is None, "the head did not start"
            time.sleep(0.5)
    yield url
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)


def test_a_submitted_job_runs_to_its_end_and_streams_its_log(head, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "configs", tree / "configs")
    run_dir = tmp_path / "run"
    words = ["configs/glyphs_maml.yaml", "outer.steps=4", "outer.meta_batch_size=4", "evaluation.episodes=10",
             "evaluation.every=0", "runtime.workers=2", "tracking.wandb.mode=offline"]  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-m", "metadist.cli", "submit", *words, "--address", head, "--run-dir", str(run_dir)],
        cwd=tree, capture_output=True, text=True, timeout=280, env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "step 4/4" in result.stdout and "after adaptation" in result.stdout, result.stdout
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["version"] == 4 and summary["workers"] == 2 and summary["runtime"]["type"] == "ray"

    # A module of the user's own is sent along, and found by the job and its workers.
    shutil.copy(ROOT / "tools" / "examples" / "pretrained.py", tree / "mine.py")
    shutil.copy(ROOT / "tools" / "examples" / "pretrained.yaml", tree / "mine.yaml")
    mine = ["mine.yaml", "algorithm.import_path=mine:Pretrained", "outer.steps=2", "evaluation.episodes=10",
            "runtime.workers=2", "tracking.wandb.mode=disabled"]  # fmt: skip
    own = subprocess.run(
        [sys.executable, "-m", "metadist.cli", "submit", *mine, "--address", head, "--run-dir", str(tmp_path / "own")],
        cwd=tree, capture_output=True, text=True, timeout=280, env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    assert own.returncode == 0, own.stdout + own.stderr
    assert json.loads((tmp_path / "own" / "summary.json").read_text())["version"] == 2

    failed = subprocess.run(
        [sys.executable, "-m", "metadist.cli", "submit", words[0], "tasks.ways=100000", "--address", head],
        cwd=tree, capture_output=True, text=True, timeout=280, env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "tasks.ways" in failed.stdout, "the job's own error belongs in the streamed log"
