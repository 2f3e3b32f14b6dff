"""Nodes with a network between them that is slow, loses packets, or breaks: the weights are those of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.faults import steps_of, wait_for_step
from tests.ray.namespaces import Nodes, nodes, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONFIG = ROOT / "configs" / "sinusoid_maml.yaml"
OPTIONS = {
    # 265 kB of gradient: too large to travel within a message.
    "model.hidden": "[256,256]", "outer.steps": 300, "outer.meta_batch_size": 6, "outer.tasks_per_microbatch": 1,
    "engine.compile": "false", "evaluation.episodes": 20, "tracking.wandb.mode": "disabled",
}  # fmt: skip
ELSEWHERE = {"runtime.type": "ray", "runtime.workers": 2, "runtime.lease_timeout_s": 20, **OPTIONS}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the weights of one process."""
    run_dir = tmp_path_factory.mktemp("local") / "run"
    words = [f"{k}={v}" for k, v in {**OPTIONS, "runtime.type": "local"}.items()]
    command = [sys.executable, "-m", "metadist.cli", "train", str(CONFIG), *words, "--run-dir", str(run_dir)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return str(summary(run_dir)["meta_params_sha256"])


@pytest.fixture(autouse=True)
def possible() -> None:
    if reason := why_not():
        pytest.skip(reason)


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def ended(run: subprocess.Popen[str]) -> str:
    """What a run printed, once it has ended well."""
    told = run.communicate(timeout=400)[0]
    assert run.returncode == 0, told[-4000:]
    return told


@pytest.mark.parametrize("more", [{}, {"runtime.server_shards": 2}, {"runtime.topology": "allreduce"}], ids=str)
def test_delay_and_loss_change_no_bit(wanted: str, tmp_path: Path, more: dict[str, Any]) -> None:
    with nodes(2, delay_s=0.01, loss=0.01) as there:
        ended(there.train(CONFIG, tmp_path / "run", {**ELSEWHERE, **more}))
        assert there.wire.lost > 50, "the fault was not seen to fire"
    assert summary(tmp_path / "run")["meta_params_sha256"] == wanted
    assert summary(tmp_path / "run")["workers"] == 2


def _cut(there: Nodes, run_dir: Path, node: int) -> subprocess.Popen[str]:
    """A run of whose nodes one is cut off when it has made ten steps."""
    run = there.train(CONFIG, run_dir, ELSEWHERE)
    wait_for_step(run_dir, 10, run)
    there.wire.cut.add(node)
    assert steps_of(run_dir) < OPTIONS["outer.steps"], "too late"
    return run


def test_a_node_that_is_cut_off_is_left_and_the_rest_goes_on(wanted: str, tmp_path: Path) -> None:
    with nodes(2, delay_s=0.01) as there:
        told = ended(_cut(there, tmp_path / "run", 2))
    assert "died" in told, "nobody was seen to go"
    assert summary(tmp_path / "run")["restarts"]["worker"] >= 1
    assert summary(tmp_path / "run")["meta_params_sha256"] == wanted


def test_a_wire_that_breaks_for_a_moment_costs_a_moment(wanted: str, tmp_path: Path) -> None:
    with nodes(2, delay_s=0.01) as there:
        run = _cut(there, tmp_path / "run", 1)
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(2)
        there.wire.cut.clear()
        ended(run)
    assert summary(tmp_path / "run")["meta_params_sha256"] == wanted
