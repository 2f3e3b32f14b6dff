"""`metadist doctor` on a cluster of separate Ray nodes, healthy and with faults planted in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadist.data import pack_arrays
from tests.conftest import ROOT
from tests.faults import state_of
from tests.ray.head import Head, ray_head

SPLITS = {"train": list(range(7)), "validation": [7, 8], "test": [9, 10, 11]}
SINES = ["configs/sinusoid_maml.yaml", "engine.compile=false", "tracking.wandb.mode=offline"]


def can_unshare() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def cluster():
    """A head and a node beside it."""
    with ray_head(cpus=1) as head:
        head.join("--num-cpus", "1", "--resources", '{"healthy": 1}')
        wait_for_nodes(head, 2)
        yield head


def wait_for_nodes(head: Head, number: int) -> None:
    import urllib.request

    for _ in range(240):
        with urllib.request.urlopen(f"{head.url}/nodes?view=summary", timeout=5) as reply:
            nodes = json.load(reply)["data"]["summary"]
        if sum(n["raylet"].get("state") == "ALIVE" for n in nodes) == number:
            return
        time.sleep(0.25)
    raise AssertionError(f"there are not {number} nodes")


def examined(head: Head, *words: str, **variables: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, findings, and what was said."""
    done = head.metadist("doctor", *words, "--json", **variables)
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)["checks"], done.stdout + done.stderr


@pytest.mark.slow
def test_a_healthy_cluster_has_nothing_to_complain_of(cluster: Head, tmp_path: Path) -> None:
    flags = ["--run-dir", str(tmp_path / "run"), "--address", cluster.url]
    code, found, said = examined(cluster, *SINES, "runtime.workers=2", *flags)
    assert code == 0 and {f["verdict"] for f in found} == {"ok"}, said
    of = {f["check"]: f["found"] for f in found}
    of_nodes = ["nodes", "versions", "resources", "memory", "storage", "tracking"]
    assert list(of) == [*of_nodes, "object store", "network", "workers"]
    assert of["nodes"].startswith("2 nodes: ") and of["versions"].endswith(" on 2 nodes")
    assert "from 2 nodes" in of["storage"] and "2 workers" in of["workers"]
    assert not list(tmp_path.iterdir()), "what was tried is taken away"
    assert said.count("checking workers") == 1, "progress comes through the job's log"


@pytest.fixture
def planted(cluster: Head, tmp_path: Path):
    """The cluster with a node that has whatever can be wrong with one."""
    if not can_unshare():
        pytest.skip("mounts of a node's own need more rights than this has")
    shapes = np.zeros((12, 6, 4, 4), dtype=np.uint8)
    pack_arrays(shapes, [f"k{i}" for i in range(12)], SPLITS, tmp_path / "set", block_examples=6)
    for name in ("kept", "apart"):
        (tmp_path / name).mkdir()
    older = tmp_path / "older" / "torch-2.0.0.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.0.0\n")
    mounts = [
        "mount -t tmpfs -o size=16m tmpfs /dev/shm",
        f"mount -t tmpfs tmpfs {tmp_path}/set",
        f"mount -t tmpfs tmpfs {tmp_path}/apart",
        f"mount --bind -o ro {tmp_path}/kept {tmp_path}/kept",
    ]
    node = cluster.join(
        "--num-cpus", "1", before=" && ".join(mounts),
        SLOW_S="0.5", PYTHONPATH=f"{tmp_path}/older{os.pathsep}{ROOT}",
    )  # fmt: skip
    wait_for_nodes(cluster, 3)
    yield cluster
    node.terminate()
    node.wait(30)
    wait_for_nodes(cluster, 2)


@pytest.mark.slow
def test_planted_faults_are_found_with_their_mending(planted: Head, tmp_path: Path) -> None:
    (tmp_path / "shards.yaml").write_text((ROOT / "configs" / "omniglot_5way1shot_maml.yaml").read_text())
    words = [str(tmp_path / "shards.yaml"), f"tasks.path={tmp_path}/set", "tasks.ways=2", "tasks.shots=1",
             "tasks.query_shots=1", "tasks.train_split=train", "tracking.wandb.mode=online",
             "runtime.gpus_per_worker=1", "runtime.workers=2", f"checkpoint.path={tmp_path}/apart"]  # fmt: skip
    flags = ["--run-dir", f"{tmp_path}/kept", "--address", planted.address]
    no_account = {"NETRC": str(tmp_path / "none"), "WANDB_API_KEY": "", "WANDB_MODE": ""}
    code, found, said = examined(planted, *words, *flags, **no_account)
    assert code == 1, said

    def named(check: str, text: str, mend: str, verdict: str = "wrong", node: bool = True) -> None:
        fits = [f for f in found if f["check"] == check and text in f["found"]]
        assert len(fits) == 1, f"{check}: {text} in {said}"
        assert fits[0]["verdict"] == verdict and mend in fits[0]["mend"] and bool(fits[0]["node"]) == node, fits

    named("versions", "torch 2.0.0", "pip install torch==")
    named("memory", "/dev/shm holds 16", "--shm-size")
    named("storage", "/kept cannot be written (OSError: Read-only file system)", "name another --run-dir")
    named("storage", "/apart is another folder than the driver's", "shared storage", verdict="warning")
    named("shards", "/set: not a shard set", "put it on storage that all nodes share")
    named("resources", "2 workers with 1 GPUs each need 2, the cluster has 0", "write gpus_per_worker: 0", node=False)
    named("tracking", "no W&B key is set up", "wandb login", node=False)


@pytest.mark.slow
def test_a_slow_worker_is_named(planted: Head, tmp_path: Path) -> None:
    words = [*SINES, "tasks={type: custom, import_path: 'tests.ray.slow_sines:SlowSines'}", "runtime.workers=3",
             "runtime.type=ray", "--allow-code", "--address", planted.address]  # fmt: skip
    _, found, said = examined(planted, *words)
    (slow,) = [f for f in found if f["check"] == "workers"]
    assert slow["verdict"] == "warning" and "the median: it takes " in slow["wanted"], said
    assert slow["node"] and "leave it out" in slow["mend"]
    assert slow["node"] == next(f["node"] for f in found if f["check"] == "versions"), "the one with the older torch"


@pytest.mark.slow
def test_a_node_that_hangs_is_named_and_the_command_ends(cluster: Head) -> None:
    before = raylets(cluster)
    assert len(before) == 2
    node = cluster.join("--num-cpus", "1")
    wait_for_nodes(cluster, 3)
    (raylet,) = raylets(cluster) - before
    os.kill(raylet, signal.SIGSTOP)
    try:
        for _ in range(100):
            if state_of(raylet) == "T":
                break
            time.sleep(0.05)
        assert state_of(raylet) == "T"
        begun = time.monotonic()
        code, found, said = examined(cluster, "--timeout", "5", "--address", cluster.address)
        assert code == 1 and time.monotonic() - begun < 60, said
        (wrong,) = [f for f in found if f["verdict"] == "wrong" and f["check"] == "nodes"]
        assert wrong["found"] == "has not answered in 5 s" and wrong["node"] and "ray status" in wrong["mend"]
        assert [f for f in found if f["check"] == "nodes" and f["verdict"] == "ok"][0]["found"].startswith("2 nodes")
    finally:
        os.kill(raylet, signal.SIGCONT)
        node.terminate()
        node.wait(30)


def raylets(head: Head) -> set[int]:
    """The processes that are nodes of this cluster."""
    listing = subprocess.run(["ps", "-wweo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 1) for line in listing.splitlines()]
    port = head.address.rpartition(":")[2]
    return {int(pid) for pid, args in rows if "/raylet --" in args and f":{port} " in args}
