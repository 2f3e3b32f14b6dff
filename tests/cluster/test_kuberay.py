"""The KubeRay manifests: fields that exist, parts that fit together, and commands that metadist and Ray take."""

from __future__ import annotations

import copy
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from metadist.config.schema import WorkersRange
from metadist.errors import ConfigError
from tests.cluster.commands import train_command
from tests.cluster.schemas import problems
from tests.conftest import ROOT

FOLDER = ROOT / "cluster" / "kuberay"
MANIFESTS = {path.name: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))}
JOBS = {name: m for name, m in MANIFESTS.items() if m["kind"] == "RayJob"}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
TOOLS = Path(sys.executable).parent


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    return spec.get("rayClusterSpec", spec)


CLUSTERS = {name: cluster_spec(m) for name, m in MANIFESTS.items() if m["kind"].startswith("Ray")}


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The specs of its pods, the head's first."""
    return [g["template"]["spec"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def locked(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version


def test_all_kinds_are_here() -> None:
    kinds = sorted(m["kind"] for m in MANIFESTS.values())
    assert kinds == ["NetworkPolicy", "PersistentVolumeClaim", "RayCluster", "RayJob", "RayJob"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_field_is_one_that_kubernetes_and_kuberay_know(name: str) -> None:
    assert problems(MANIFESTS[name]) == []


HEAD_POD = ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec")


@pytest.mark.parametrize(
    "path, value",
    [
        (("spec", "backofLimit"), 3),
        (("spec", "backoffLimit"), "3"),
        (("spec", "submissionMode"), "HttpMode"),
        (("spec", "rayClusterSpec", "enableInTreeAutoScaling"), True),
        (("spec", "rayClusterSpec", "autoscalerOptions", "version"), "v3"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        ((*HEAD_POD, "terminationGracePeriod"), 120),
        ((*HEAD_POD, "containers", 0, "volumeMount"), []),
        ((*HEAD_POD, "containers", 0, "lifecycle", "preStop", "exec", "command"), "ray stop"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplica"), 8),
    ],
)
def test_a_misspelt_field_and_a_wrong_value_are_found(path: tuple[str | int, ...], value: Any) -> None:
    wrong = copy.deepcopy(MANIFESTS["rayjob.yaml"])
    at = wrong
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    found = problems(wrong)
    assert found and all(str(path[-1]) in problem for problem in found)


def test_what_must_be_there_is_missed() -> None:
    wrong = copy.deepcopy(MANIFESTS["raycluster.yaml"])
    del wrong["spec"]["headGroupSpec"]["template"]
    assert problems(wrong) == ["spec.headGroupSpec: 'template' is a required property"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_versions_are_the_tested_ones(name: str) -> None:
    assert CLUSTERS[name]["rayVersion"] == locked("ray")
    images = {c["image"] for pod in pods(CLUSTERS[name]) for c in [*pod["containers"], *pod.get("initContainers", [])]}
    assert images == {f"registry.example.com/metadist:{VERSION}-gpu"}, "one image, so that no node's versions differ"
    assert images <= set(re.findall(r"-t (\S+)", (ROOT / "cluster" / "Dockerfile").read_text()))


def test_the_cluster_that_stays_is_the_one_that_a_job_makes() -> None:
    assert CLUSTERS["raycluster.yaml"] == CLUSTERS["rayjob.yaml"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_head_schedules_no_work_and_workers_scale(name: str) -> None:
    spec = CLUSTERS[name]
    head, (workers,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert spec["enableInTreeAutoscaling"] and 1 <= workers["minReplicas"] < workers["maxReplicas"]
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def gibibytes(quantity: str) -> int:
    return int(quantity.removesuffix("Gi"))


@pytest.mark.parametrize("name", CLUSTERS)
def test_shared_memory_is_in_memory_and_within_the_pods(name: str) -> None:
    for pod in pods(CLUSTERS[name]):
        (container,) = pod["containers"]
        volumes = {v["name"]: v for v in pod["volumes"]}
        (shm,) = (m["name"] for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm")
        assert volumes[shm]["emptyDir"]["medium"] == "Memory"
        limit = container["resources"]["limits"]["memory"]
        assert limit == container["resources"]["requests"]["memory"]
        assert gibibytes(volumes[shm]["emptyDir"]["sizeLimit"]) <= gibibytes(limit) // 2


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_mount_has_its_volume_and_pods_are_not_root(name: str) -> None:
    for pod in pods(CLUSTERS[name]):
        volumes = {v["name"] for v in pod["volumes"]}
        containers = [*pod["containers"], *pod.get("initContainers", [])]
        assert {m["name"] for c in containers for m in c["volumeMounts"]} == volumes
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert all(c["securityContext"]["allowPrivilegeEscalation"] is False for c in containers)
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        assert claims in ([], [MANIFESTS["storage.yaml"]["metadata"]["name"]])
    assert MANIFESTS["storage.yaml"]["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_secrets_come_from_a_secret_by_the_environment(name: str) -> None:
    head, *workers = pods(CLUSTERS[name])
    for pod in (head, *workers):
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            for variable in container.get("env", []):
                if re.search("KEY|TOKEN|SECRET", variable["name"]):
                    assert variable["valueFrom"]["secretKeyRef"]["name"] == "metadist" and "value" not in variable
    assert CLUSTERS[name]["authOptions"] == {"mode": "token", "secretName": "metadist"}
    names = {v["name"] for v in head["containers"][0]["env"]}
    assert "WANDB_API_KEY" in names
    assert not any("WANDB" in str(w) for w in workers), "the driver alone writes to Weights & Biases"


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_pod_has_the_time_to_drain(name: str) -> None:
    for pod in pods(CLUSTERS[name]):
        command = " ".join(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"])
        (deadline,) = re.findall(r"--deadline-remaining-seconds (\d+)", command)
        assert 30 < int(deadline) < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", JOBS)
def test_the_entrypoint_is_a_command_that_metadist_takes(name: str) -> None:
    job, spec = JOBS[name]["spec"], CLUSTERS[name]
    config, params = train_command(job["entrypoint"])
    assert not re.search(r"""['"\\$]""", job["entrypoint"]), "nothing that a shell in between could change"
    assert config.runtime.type == "ray" and config.runtime.address == "auto"
    assert job["backoffLimit"] > 0 and params["resume_if_exists"] is True
    (group,) = spec["workerGroupSpecs"]
    workers = config.runtime.workers
    assert isinstance(workers, WorkersRange)
    assert (workers.min, workers.max) == (group["minReplicas"], group["maxReplicas"])
    assert config.runtime.gpus_per_worker == 1, "the head has none, so `auto` would take none"
    requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert config.runtime.threads_per_worker <= int(requests["cpu"])
    mounts = [m["mountPath"] for m in pods(spec)[0]["containers"][0]["volumeMounts"]]
    paths = [str(params["run_dir"]), *([config.tasks.path] if config.tasks.type == "shards" else [])]
    assert all(any(p.startswith(f"{m}/") for m in mounts) for p in paths)
    lasting = "s3://" in (config.checkpoint.path or "") or str(params["run_dir"]).startswith("/shared/")
    assert lasting, "a new cluster would not find the run"


def test_an_entrypoint_that_is_wrong_is_found() -> None:
    with pytest.raises(ConfigError, match="gpus_per_worker"):
        train_command(JOBS["rayjob.yaml"]["spec"]["entrypoint"].replace("gpus_per_worker", "gpu_per_worker"))


def test_the_network_policy_covers_the_cluster_and_opens_the_dashboard_alone() -> None:
    spec = MANIFESTS["networkpolicy.yaml"]["spec"]
    among_themselves, from_outside = spec["ingress"]
    assert among_themselves["from"] == [{"podSelector": spec["podSelector"]}]
    head = pods(CLUSTERS["raycluster.yaml"])[0]["containers"][0]
    dashboards = [p["containerPort"] for p in head["ports"] if p["name"] == "dashboard"]
    assert [p["port"] for p in from_outside["ports"]] == dashboards == [head["readinessProbe"]["httpGet"]["port"]]


def test_shards_are_fetched_from_object_storage_and_checked(tmp_path: Path) -> None:
    """The init container's own command, with a stand-in for S3 and another folder."""
    from moto.server import ThreadedMotoServer

    from metadist.data import pack_arrays
    from metadist.tasks.glyphs import glyph_images

    images, names, splits = glyph_images()
    few = {split: [names[c] for c in classes[:5]] for split, classes in splits.items()}
    chosen = [c for split in few for c in splits[split][:5]]
    pack_arrays(images[chosen], [names[c] for c in chosen], few, tmp_path / "packed")
    (fetch,) = pods(CLUSTERS["rayjob-object-storage.yaml"])[0]["initContainers"]
    values = {v["name"]: v["value"] for v in fetch["env"] if "value" in v}
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        import s3fs

        url = "http://{}:{}".format(*server.get_host_and_port())
        keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
        bucket = s3fs.S3FileSystem(key="k", secret="s", endpoint_url=url)
        bucket.mkdir(values["SHARDS"].partition("/")[0])
        bucket.put(f"{tmp_path / 'packed'}/", f"{values['SHARDS']}/", recursive=True)
        path = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **keys, **values, "AWS_ENDPOINT_URL": url, "PATH": path, "PYTHONPATH": str(ROOT)}
        *shell, script = fetch["command"]
        assert script.count("/shards/") == 2

        def run() -> subprocess.CompletedProcess[str]:
            here = script.replace("/shards/", f"{tmp_path}/shards/")
            return subprocess.run([*shell, here], env=environment, capture_output=True, text=True)

        done = run()
        assert done.returncode == 0, done.stderr
        fetched = {p.name: p.read_bytes() for p in (tmp_path / "shards" / "omniglot").iterdir()}
        assert fetched == {p.name: p.read_bytes() for p in (tmp_path / "packed").iterdir()}
        tar = next(name for name in fetched if name.endswith(".tar"))
        bucket.pipe_file(f"{values['SHARDS']}/{tar}", fetched[tar][:-1024])
        assert run().returncode != 0, "a shard that is cut keeps the pod from starting"
    finally:
        server.stop()


# ------------------------------------------------------------------ with real Ray

HEAD = """
export PATH={tools}:$PATH
exec bash -c "ulimit -n 4096; ray start --head --block --disable-usage-stats {params} --num-cpus=2 {ports}"
"""


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The head's container: Ray started as KubeRay does it, from the manifest, among processes of its own."""
    from tests.ray.head import free_port

    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        pytest.skip("a PID namespace of its own wants rights that are not here")
    head = CLUSTERS["rayjob.yaml"]["headGroupSpec"]
    params = {k: v for k, v in head["rayStartParams"].items() if k != "num-cpus"}
    # 52365 and the like may be taken on this machine.
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    ports = {name: free_port() for name in names}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2}
    environment = {**os.environ, **token, "RAY_ADDRESS": f"127.0.0.1:{ports['port']}", "WANDB_MODE": "disabled",
                   "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}  # fmt: skip
    flags = " ".join(f"--{k}={v}" for k, v in params.items())
    script = HEAD.format(tools=TOOLS, params=flags, ports=" ".join(f"--{k}={v}" for k, v in ports.items()))
    started = {k: v for k, v in environment.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen([*unshare, "bash", "-c", script], env=started, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    (inside,) = _children_of(process.pid)
    enter = ["nsenter", "--target", str(inside), "--pid", "--mount"]
    yield {"container": head["template"]["spec"]["containers"][0], "ports": ports, "environment": environment,
           "enter": enter, "process": process, "inside": inside}  # fmt: skip
    process.kill()
    process.wait()


def _children_of(pid: int) -> list[int]:
    for _ in range(100):
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if listed:
            return [int(p) for p in listed]
        time.sleep(0.05)
    raise AssertionError("nothing was started")


def _probe(probe: dict[str, Any], ports: dict[str, int]) -> bool:
    here = {52365: ports["dashboard-agent-listen-port"], 8265: ports["dashboard-port"]}
    address = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()[0]
    url = f"http://{address}:{here[probe['httpGet']['port']]}{probe['httpGet']['path']}"
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except OSError:
        return False


def _until(true: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.slow
def test_a_pod_answers_its_probes_and_drains_when_it_is_stopped(pod: dict[str, Any], tmp_path: Path) -> None:
    """As the kubelet does: probes from outside and without the token; preStop, then SIGTERM to the first process."""
    container, enter, environment = pod["container"], pod["enter"], pod["environment"]
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        _until(lambda kind=kind: _probe(container[kind], pod["ports"]))
    run_dir = tmp_path / "run"
    entrypoint = shlex.split(JOBS["rayjob.yaml"]["spec"]["entrypoint"])
    words = ["/opt/metadist/", f"{ROOT}/", "/shared/runs/glyphs", str(run_dir)]
    command = [w.replace(words[0], words[1]).replace(words[2], words[3]) for w in entrypoint]
    less = ["runtime.gpus_per_worker=0", "outer.steps=100000", "evaluation.every=0"]
    log = (tmp_path / "log").open("w")
    driver = subprocess.Popen([*enter, *command, *less], env=environment, stdout=log, stderr=log)
    metrics = run_dir / "metrics.jsonl"
    _until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 3)

    before_the_stop = container["lifecycle"]["preStop"]["exec"]["command"]
    done = subprocess.run([*enter, *before_the_stop], env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert driver.wait(5) == 143, (tmp_path / "log").read_text()
    last = metrics.read_text().splitlines()[-1]
    (version,) = re.findall(r'"version": (\d+)', last)
    assert (run_dir / "checkpoints" / f"{int(version):08}" / "state.json").is_file(), "the last step is kept"
    assert not _probe(container["livenessProbe"], pod["ports"])
    os.kill(pod["inside"], signal.SIGTERM)
    pod["process"].wait(30)
