"""The Slurm script: what it calls in which order, what it does about signals, and that nothing is left running.

Slurm's programs are stand-ins that run the commands here; in the slow test Ray and metadist are the real ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.commands import train_command
from tests.conftest import ROOT

SCRIPT = ROOT / "cluster" / "slurm" / "metadist.sbatch"
CONFIG = str(ROOT / "configs" / "glyphs_maml.yaml")
TOOLS = Path(sys.executable).parent

SRUN = r"""#!/usr/bin/env bash
echo "srun $*" >> "$CALLS"
tasks=1
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    shift
done
for ((i = 0; i < tasks; i++)); do "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
while kill -0 "${pids[@]}" 2>/dev/null; do wait; done
"""
SCONTROL = r"""#!/usr/bin/env bash
echo "scontrol $*" >> "$CALLS"
if [[ $1 == show ]]; then printf '%s\n' $NODES; fi
"""
HOSTNAME = r"""#!/usr/bin/env bash
echo "10.0.0.7 192.168.1.7 "
"""
# A node joins half a second after it was started; `ray status` tells of those that have, as Ray 2.60 does.
RAY = r"""#!/usr/bin/env bash
echo "ray $*" >> "$CALLS"
case $1 in
start)
    [[ $FAULT == head && $* == *--head* ]] && exit 1
    [[ $FAULT == node && $* != *--head* ]] && exec sleep 60
    trap 'echo "stopped" >> "$CALLS"; exit 0' TERM
    sleep 0.5
    echo "joined" >> "$CALLS"
    while :; do sleep 0.1; done ;;
health-check) grep -q joined "$CALLS" ;;
status)
    echo "Node status"
    echo "Active:"
    grep joined "$CALLS" | sed 's/.*/ 1 node_0123456789abcdef/'
    echo "Pending:"
    echo " 1 node_pending" ;;
esac
"""
METADIST = r"""#!/usr/bin/env bash
echo "metadist $*" >> "$CALLS"
trap 'echo "driver got TERM" >> "$CALLS"; sleep 0.3; echo "driver ended" >> "$CALLS"; exit ${ON_TERM:-143}' TERM
until [[ -e $STATE/finish ]]; do sleep 0.05; done
exit "$(cat "$STATE/finish")"
"""


class Job:
    """The script, run as Slurm's batch step would, with stand-ins on PATH."""

    def __init__(self, folder: Path, nodes: int = 3, fault: str = "", job_id: int = 4242, **environment: str) -> None:
        self.folder, self.calls_file = folder, folder / "calls"
        self.calls_file.touch()
        programs = folder / "bin"
        programs.mkdir()
        stand_ins = {"srun": SRUN, "scontrol": SCONTROL, "hostname": HOSTNAME, "ray": RAY, "metadist": METADIST}
        for name, text in stand_ins.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "CALLS": str(self.calls_file), "STATE": str(folder), "FAULT": fault,
            "NODES": " ".join(f"gpu{i:02}" for i in range(1, nodes + 1)),
            "SLURM_JOB_ID": str(job_id), "SLURM_JOB_NODELIST": f"gpu[01-{nodes:02}]",
            "SLURM_CPUS_ON_NODE": "16", "SLURM_GPUS_ON_NODE": "4", **environment,
        }  # fmt: skip

    def start(self, *words: str) -> Job:
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), *words], env=self.environment, text=True, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        return self

    def begin(self) -> Job:
        """Starts it and returns when the driver runs."""
        self.start(CONFIG, "/shared/runs/one", "outer.steps=50")
        deadline = time.monotonic() + 60
        while not any(c.startswith("metadist ") for c in self.calls()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.end()
            time.sleep(0.05)
        return self

    def finish(self, status: int) -> Job:
        (self.folder / "finish").write_text(str(status))
        return self

    def end(self) -> tuple[int, str]:
        """Its exit status and what it said."""
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    def close(self) -> None:
        """Leaves nothing behind, also where the script did."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(**options: object) -> Job:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Job(folder, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run([str(TOOLS / "shellcheck"), str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ray_is_started_on_every_node_then_the_run_then_everything_is_stopped(job: Callable[..., Job]) -> None:
    run = job().begin().finish(0)
    status, said = run.end()
    assert status == 0, said
    calls = run.calls()
    assert calls[0] == "scontrol show hostnames gpu[01-03]"
    head, others, cleaning = (c for c in calls if c.startswith("srun ") and "hostname" not in c)
    each = "--overlap --ntasks-per-node=1 --cpus-per-task=16 --cpu-bind=none --kill-on-bad-exit=0"
    assert head.startswith(f"srun {each} --nodes=1 --ntasks=1 --nodelist=gpu01 ray start --head ")
    assert others.startswith(f"srun {each} --nodes=2 --ntasks=2 --nodelist=gpu02,gpu03 ray start --address=10.0.0.7:")
    for started in (head, others):
        assert "--block" in started and "--num-cpus=16 --num-gpus=4" in started
    gcs = re.findall(r"--port=(\d+)", head)[0]
    assert "--node-ip-address=10.0.0.7" in head and f"--address=10.0.0.7:{gcs} " in others
    assert "--dashboard-host=127.0.0.1" in head, "the job server is for this machine alone"

    (driver,) = (c for c in calls if c.startswith("metadist "))
    config, params = train_command(driver.split())
    assert config.runtime.type == "ray" and config.runtime.address == f"10.0.0.7:{gcs}"
    assert config.runtime.workers == "auto" and config.outer.steps == 50
    assert str(params["run_dir"]) == "/shared/runs/one" and params["resume_if_exists"] is True
    assert calls[: calls.index(driver)].count("joined") == 3, "the run waits for every node"
    assert calls.index(head) < calls.index("joined") < calls.index(others), "the others come when the head answers"
    after = calls[calls.index(driver) :]
    assert after.count("stopped") == 3 and after[-1] == cleaning and "--ntasks=3 rm -rf /tmp/ray-4242" in cleaning
    assert not any("requeue" in c for c in calls)


def test_before_the_time_limit_the_run_is_stopped_and_the_job_goes_back_into_the_queue(job: Callable[..., Job]) -> None:
    run = job().begin()
    run.process.send_signal(signal.SIGUSR1)
    status, said = run.end()
    calls = run.calls()
    assert status == 143, said
    order = ["driver got TERM", "driver ended", "scontrol requeue 4242", "stopped"]
    assert [c for c in dict.fromkeys(calls) if c in order] == order, "Ray outlives the driver"
    assert calls.count("stopped") == 3


def test_a_job_that_is_cancelled_stops_likewise_and_is_not_queued_again(job: Callable[..., Job]) -> None:
    run = job(nodes=1).begin()
    run.process.send_signal(signal.SIGTERM)
    status, said = run.end()
    assert status == 143, said
    assert "driver ended" in run.calls() and run.calls().count("stopped") == 1
    assert not any("requeue" in c for c in run.calls())


def test_the_queue_is_left_alone_on_request_and_when_the_run_had_ended(job: Callable[..., Job]) -> None:
    asked = job(nodes=1, METADIST_REQUEUE="0").begin()
    in_time = job(nodes=1, job_id=6, ON_TERM="0").begin()
    for run in (asked, in_time):
        run.process.send_signal(signal.SIGUSR1)
    failed = job(nodes=1, job_id=7).begin().finish(1)
    assert [run.end()[0] for run in (asked, in_time, failed)] == [143, 0, 1]
    assert not any("requeue" in c for run in (asked, in_time, failed) for c in run.calls())
    assert failed.calls().count("stopped") == 1


@pytest.mark.parametrize(
    "fault, says",
    [("head", "Ray's head ended"), ("node", "all 3 nodes: not there after METADIST_PATIENCE_S (4) seconds")],
)
def test_a_cluster_that_does_not_come_up_is_taken_down(job: Callable[..., Job], fault: str, says: str) -> None:
    run = job(fault=fault, METADIST_PATIENCE_S="4").start(CONFIG, "/shared/runs/one")
    status, said = run.end()
    assert status == 1 and says in said, said
    assert not any(c.startswith("metadist") for c in run.calls())
    assert run.calls().count("joined") == run.calls().count("stopped")


def test_bad_usage_is_told_before_anything_is_started(job: Callable[..., Job]) -> None:
    bare, missing = job().start(CONFIG), job().start("nowhere.yaml", "/shared/runs/one")
    status, said = bare.end()
    assert status == 2 and "usage: sbatch" in said
    status, said = missing.end()
    assert status == 1 and "there is no file nowhere.yaml" in said
    assert bare.calls() == missing.calls() == []


def _ports(calls: list[str]) -> set[int]:
    return {int(p) for c in calls for p in re.findall(r"port=(\d+)", c)} - {0}


def test_two_jobs_on_one_node_share_no_port(job: Callable[..., Job]) -> None:
    first, second = (job(nodes=2, job_id=i).begin().finish(0) for i in (811_199, 811_200))
    assert first.end()[0] == second.end()[0] == 0
    a, b = _ports(first.calls()), _ports(second.calls())
    assert len(a) == len(b) == 5 and not a & b
    assert all(20_000 <= p < 32_768 for p in a | b), "beside Ray's own ports and those that Linux hands out"


def test_slurm_is_asked_for_what_the_script_counts_on() -> None:
    text = SCRIPT.read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert asked["signal"] == "B:USR1@300" and "' USR1\n" in text, "the batch shell alone gets the signal that it traps"
    assert asked["ntasks-per-node"] == "1" and "exclusive" in asked and "requeue" in asked
    assert asked["open-mode"] == "append", "a job that was queued again goes on with its log"


@pytest.mark.slow
def test_a_real_run_across_two_real_nodes_of_ray(tmp_path: Path) -> None:
    """Slurm alone is a stand-in. The run is stopped as before a time limit, and run again to its end."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{programs}{os.pathsep}{TOOLS}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"), "NODES": "here here", "SLURM_JOB_NODELIST": "here,here",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_CPUS_ON_NODE": "1", "METADIST_HEAD_ADDRESS": "127.0.0.1",
        "WANDB_MODE": "disabled", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    run_dir = tmp_path / "run"
    words = [CONFIG, str(run_dir), "outer.steps=100000", "evaluation.episodes=10", "evaluation.every=0"]

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(["bash", str(SCRIPT), *words, *more], env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip

    def ours() -> list[str]:
        listed = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True).stdout.splitlines()
        return [line for line in listed if f"/tmp/ray-{os.getpid()}" in line]

    first = start()
    try:
        metrics = run_dir / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
            assert first.poll() is None and time.monotonic() < deadline, first.communicate(timeout=60)
            time.sleep(0.5)
        assert ours(), "Ray of this job runs"
        first.send_signal(signal.SIGUSR1)
        said, _ = first.communicate(timeout=120)
        assert first.returncode == 143 and "all 2 nodes are there" in said, said
        assert f"scontrol requeue {os.getpid()}" in (tmp_path / "calls").read_text()
        assert not ours(), "nothing of Ray is left"
        done = json.loads(metrics.read_text().splitlines()[-1])["version"]
        assert (run_dir / "checkpoints" / f"{done:08}" / "state.json").is_file()

        again = start(f"outer.steps={done + 2}")
        said, _ = again.communicate(timeout=240)
        assert again.returncode == 0, said
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["version"] == done + 2 and summary["workers"] == 2, "one CPU of each node"
        assert not ours() and not Path(f"/tmp/ray-{os.getpid()}").exists()
    finally:
        if first.poll() is None:
            first.terminate()
            first.communicate(timeout=120)
        shutil.rmtree(f"/tmp/ray-{os.getpid()}", ignore_errors=True)
