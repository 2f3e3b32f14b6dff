"""Promise P1: the bits of a run do not depend on where, by how many and with which interruptions it is computed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metadist.cli import main
from metadist.outer import gradient
from tests.conftest import ROOT
from tests.faults import SERVERS, WORKERS, alive, struck, wait_for_step

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
    ("workers", "shards", "node_sums"),
    [
        pytest.param(1, 1, False, marks=pytest.mark.slow),
        pytest.param(2, 4, False, marks=pytest.mark.slow),
        (3, 2, True),
    ],
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


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once_and_the_run_resumes_to_the_same_bits(omniglot_shards, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    process = started(omniglot_shards, run_dir, **LOCAL, **{"checkpoint.every": 2})
    wait_for_step(run_dir, 5, process)
    # The first is noted by a process that is held in the middle of a step: the second finds it waiting for its end.
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) in (130, 143)
    invoke(["resume", str(run_dir)])
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["meta_params_sha256"] == undisturbed[0]["meta_params_sha256"]
    assert numbers(run_dir) == undisturbed[1]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_notice_that_the_drivers_node_will_go_leaves_a_run_that_resumes(
    omniglot_shards, undisturbed, tmp_path, monkeypatch
):
    import ray
    from click.testing import CliRunner

    run_dir = tmp_path / "run"

    def draining() -> set[str]:
        made = (run_dir / "metrics.jsonl").read_bytes().count(b"\n") if (run_dir / "metrics.jsonl").exists() else 0
        return {ray.get_runtime_context().get_node_id()} if made >= 3 else set()

    two = {"runtime.type": "ray", "runtime.workers": 2}
    with monkeypatch.context() as patch:
        patch.setattr("metadist.runtime.ray.draining_nodes", draining)
        patch.setattr("metadist.runtime.ray._MEMBERSHIP_S", 0.0)
        told = CliRunner().invoke(main, ["train", CONFIG, *words(omniglot_shards, **two), "--run-dir", str(run_dir)])
    assert told.exit_code == 143 and f"metadist resume {run_dir}" in told.output, told.output
    assert int((run_dir / "checkpoints" / "latest").read_text()) == len(numbers(run_dir)) < STEPS
    invoke(["resume", str(run_dir), "runtime.type=local"])
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["meta_params_sha256"] == undisturbed[0]["meta_params_sha256"]


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
    "fault",
    [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
    ids=["killed", "stopped"],
)
@pytest.mark.usefixtures("cluster")
def test_a_worker_lost_in_the_middle_changes_nothing(omniglot_shards, undisturbed, tmp_path, fault):
    run_dir = tmp_path / "run"
    two = {"runtime.type": "ray", "runtime.workers": 2}
    # What has stopped is taken over by the other one, so it is missed only after some more steps.
    stopped = {"outer.steps": 400, "runtime.lease_timeout_s": 3} if fault == signal.SIGSTOP else {}
    with struck(run_dir, 3, WORKERS, fault) as lost:
        summary = run(omniglot_shards, run_dir, **two, **stopped)
    assert lost and summary["restarts"]["worker"] == 1, "the fault was not seen to fire"
    if fault == signal.SIGKILL:
        assert summary["meta_params_sha256"] == undisturbed[0]["meta_params_sha256"]
    else:
        assert numbers(run_dir)[:STEPS] == undisturbed[1] and summary["releases"] >= 1
        assert not alive(lost[0]), "a stopped process is ended, or it would keep its memory and its GPU"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shards", "fault"),
    [(2, signal.SIGKILL), (1, signal.SIGSTOP)],
    ids=["killed", "stopped"],
)
@pytest.mark.usefixtures("cluster")
def test_a_server_lost_in_the_middle_is_restored_to_the_same_bits(
    omniglot_shards, undisturbed, tmp_path, shards, fault
):
    run_dir = tmp_path / "run"
    served = {"runtime.type": "ray", "runtime.workers": 2, "runtime.server_shards": shards}
    with struck(run_dir, 7, SERVERS, fault) as lost:
        summary = run(omniglot_shards, run_dir, **served, **{"runtime.server_timeout_s": 20})
    assert lost and summary["restarts"] == {"worker": 0, "server": 1, "driver": 0}, "the fault was not seen to fire"
    assert summary["meta_params_sha256"] == undisturbed[0]["meta_params_sha256"]
    assert summary["tasks_seen"] == undisturbed[0]["tasks_seen"], "steps made twice count once"
    assert numbers(run_dir) == undisturbed[1], "a line of metrics.jsonl is missing, doubled or different"
    assert not alive(lost[0])


@pytest.mark.slow
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
    class InOrderOfArrival(gradient.TreeSum):
        def held(self, room=np.empty):
            total = None
            for value in self._held.values():
                total = value.copy() if total is None else value + total * np.float32(1)
            # One block over everything, summed from left to right instead of by the tree.
            return {gradient.Block((self.count - 1).bit_length(), 0): total}

    monkeypatch.setattr("metadist.worker.TreeSum", InOrderOfArrival)
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
