"""`metadist submit` against a Ray head on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metadist.errors import ClusterError, ConfigError
from metadist.jobs import Jobs
from metadist.packing import EXCLUDES, files_of, tree_at
from metadist.submit import Sending, packed, submission
from tests.conftest import ROOT
from tests.ray.head import NO_TOKEN, Head, environment, ray_head

KEY, PASSWORD = "0123456789abcdef" * 2 + "deadbeef", "correct-horse-battery"
SMALL = ["outer.meta_batch_size=4", "outer.tasks_per_microbatch=1", "evaluation.episodes=10",
         "evaluation.every=0", "tracking.wandb.mode=offline"]  # fmt: skip
SHOWS_ITS_ENVIRONMENT = """
import hashlib, os, sys
for name in ("MINE", "WANDB_API_KEY"):
    print(name, hashlib.sha256(os.environ.get(name, "").encode()).hexdigest(), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def head():
    with ray_head() as started:
        yield started


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "configs", tmp_path / "tree" / "configs")
    return tmp_path / "tree"


def test_a_submitted_job_runs_to_its_end_and_streams_its_log(head: Head, tree: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ["configs/glyphs_maml.yaml", "outer.steps=4", *SMALL, "runtime.workers=2"]
    result = head.metadist("submit", *words, "--address", head.url, "--run-dir", str(run_dir), cwd=tree)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "step 4/4" in result.stdout and "after adaptation" in result.stdout, result.stdout
    assert result.stdout.count("step 4/4") == 1, "the log is shown once"
    assert f"sends {tree}, " in result.stderr and " files of " in result.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["version"] == 4 and summary["workers"] == 2 and summary["runtime"]["type"] == "ray"

    failed = head.metadist(
        "submit", words[0], "tasks.ways=100000", "--address", head.url, cwd=tree, RAY_ADDRESS="http://127.0.0.1:1"
    )
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "tasks.ways" in failed.stdout, "the job's own error belongs in the streamed log"
    assert "run directory: ~/metadist-runs/glyphs-maml-" in failed.stderr.replace("_", "-")


@pytest.mark.slow
def test_secrets_travel_by_environment_alone(head: Head, tree: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "own"
    own = (ROOT / "tools" / "examples" / "pretrained.py").read_text()
    (tree / "mine.py").write_text(own.replace("import torch\n", SHOWS_ITS_ENVIRONMENT + "import torch\n", 1))
    shutil.copy(ROOT / "tools" / "examples" / "pretrained.yaml", tree / "mine.yaml")
    words = ["mine.yaml", "algorithm.import_path=mine:Pretrained", "outer.steps=2", "evaluation.episodes=10",
             "runtime.workers=1", "tracking.wandb.mode=offline"]  # fmt: skip
    flags = ["--address", head.url, "--run-dir", str(run_dir), "--env", "MINE"]
    result = head.metadist("submit", *words, *flags, cwd=tree, MINE=PASSWORD, WANDB_API_KEY=KEY)
    assert result.returncode == 0, result.stdout + result.stderr
    # A module of the user's own was sent along, found by the job, and had the variables.
    for name, secret in (("MINE", PASSWORD), ("WANDB_API_KEY", KEY)):
        assert f"{name} {hashlib.sha256(secret.encode()).hexdigest()}" in result.stdout
    assert "sent by environment: WANDB_API_KEY, MINE" in result.stderr

    jobs = json.loads(head.metadist("submit", "status", "--all", "--json", "--address", head.url).stdout)["jobs"]
    (job,) = [j for j in jobs if j["run_directory"] == str(run_dir)]
    told = Jobs(head.url).details(job["job"])
    shown = head.metadist("submit", "logs", job["job"], "--address", head.url).stdout
    assert "Running entrypoint" in shown
    files = [p for p in run_dir.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files)
    for secret in (PASSWORD, KEY):
        assert secret not in result.stdout + result.stderr + shown
        assert secret not in told.entrypoint + json.dumps(told.metadata)
        assert not [p for p in files if secret.encode() in p.read_bytes()], "a secret was kept"


@pytest.mark.slow
def test_a_job_that_nobody_watches_is_looked_at_stopped_and_gone_on_with(
    head: Head, tree: Path, tmp_path: Path
) -> None:
    run_dir, at = tmp_path / "run", ["--address", head.url]
    words = ["configs/sinusoid_maml.yaml", *SMALL, "engine.compile=false", "runtime.workers=1", *at]
    words += ["--run-dir", str(run_dir)]  # after the address, which the second time comes from the environment
    sent = head.metadist("submit", *words, "outer.steps=1000000", "checkpoint.every=1000000", "--detach", cwd=tree)
    job = sent.stdout.strip()
    assert sent.returncode == 0 and job.startswith("raysubmit_") and "\n" not in job, "the id alone, for scripts"
    assert f"metadist submit logs {job} --follow --address {head.url}" in sent.stderr

    watching = subprocess.Popen(
        [sys.executable, "-m", "metadist.cli", "submit", "logs", job, "--follow", *at],
        env=environment(**head.variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watching.stdout is not None
    while "step " not in (line := watching.stdout.readline()):
        assert line, "the log ended"
    watching.send_signal(signal.SIGINT)
    _, said = watching.communicate(timeout=60)
    assert watching.returncode == 130
    assert f"{job} goes on" in said and f"metadist submit stop {job} --address {head.url}" in said
    assert " running " in head.metadist("submit", "status", job, *at).stdout

    assert "is asked to stop" in head.metadist("submit", "stop", job, *at).stdout
    jobs = Jobs(head.url)
    while not jobs.details(job).status.is_terminal():
        time.sleep(0.2)
    assert jobs.details(job).status.value == "STOPPED"
    log = head.metadist("submit", "logs", job, *at).stdout
    kept = max(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdecimal())
    assert kept > 0 and f"go on with `metadist resume {run_dir}`" in log, "it had the time for a checkpoint"
    assert "had ended already" in head.metadist("submit", "stop", job, *at).stdout

    # The same again: the run goes on. RAY_ADDRESS is Ray's own name for where; --address (above) wins over it.
    more = head.metadist("submit", *words[:-4], *words[-2:], f"outer.steps={kept + 2}", cwd=tree, RAY_ADDRESS=head.url)
    assert more.returncode == 0, more.stdout + more.stderr
    assert f"from step {kept}" in more.stdout
    assert json.loads((run_dir / "summary.json").read_text())["version"] == kept + 2

    unknown = head.metadist("submit", "status", "raysubmit_none", *at)
    assert unknown.returncode == 1 and unknown.stderr.startswith("metadist: raysubmit_none: is no job of ")


def test_a_head_of_another_version_is_refused_in_a_line(head: Head) -> None:
    program = "import ray; ray.__version__ = '2.1.0'; from metadist.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "submit", "configs/sinusoid_maml.yaml", "--address", head.url],
        cwd=ROOT, env=environment(**NO_TOKEN), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("metadist: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "and here is Ray 2.1.0" in line and "pip install 'ray[default]==" in line


JOINS = """
import sys, ray
from metadist.config.schema import RuntimeConfig
from metadist.runtime.cluster import connect

@ray.remote
class Actor:
    def answer(self):
        return 42

for address in sys.argv[1:]:
    connect(RuntimeConfig(workers=1, address=None if address == "here" else address))
    actor = Actor.remote()
    print(ray.get(actor.answer.remote(), timeout=60))
    ray.shutdown()
"""


def joined(*addresses: str) -> str:
    """Joins cluster after cluster in one process that has a token at hand; what an actor on each said."""
    ours = environment(RAY_AUTH_TOKEN="a" * 64)
    ours.pop("RAY_AUTH_MODE", None)
    done = subprocess.run(
        [sys.executable, "-c", JOINS, *addresses], cwd=ROOT, env=ours, capture_output=True, text=True, timeout=200
    )
    return done.stdout if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.slow
def test_a_token_at_hand_is_not_used_on_a_cluster_that_has_none(head: Head) -> None:
    assert joined("here", head.address) == "42\n42\n"


@pytest.mark.slow
def test_a_token_is_used_where_a_cluster_asks_for_it(head: Head) -> None:
    with ray_head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 64) as asks:
        assert joined(asks.address, head.address, "here", asks.address) == "42\n" * 4


@pytest.mark.slow
def test_a_head_that_wants_a_token_says_so_in_a_line() -> None:
    with ray_head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 64) as head:
        words = ["submit", "status", "--all", "--address", head.url]
        none = head.metadist(*words, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")
        wrong = head.metadist(*words, RAY_AUTH_TOKEN="b" * 64)
        right = head.metadist(*words)
        doctors = [
            head.metadist("doctor", "--address", where, "--json", "--timeout", "10", RAY_AUTH_TOKEN="b" * 64)
            for where in (head.url, head.address)
        ]
    assert (none.returncode, wrong.returncode, right.returncode) == (1, 1, 0), right.stderr
    assert "asks for a token, and none was given; set RAY_AUTH_TOKEN" in none.stderr
    assert "does not take the token that was given; set RAY_AUTH_TOKEN" in wrong.stderr
    assert none.stderr.count("\n") == wrong.stderr.count("\n") == 1, "one line"
    assert "has no jobs" in right.stdout
    for doctor in doctors:
        (found,) = json.loads(doctor.stdout)["checks"]
        assert doctor.returncode == 1 and found["verdict"] == "wrong"
        assert " token" in found["found"] and "set RAY_AUTH_TOKEN" in found["mend"], found


# --------------------------------------------------------------------------- what is sent


def test_what_is_measured_is_what_ray_packs(tmp_path: Path) -> None:
    from zipfile import ZipFile

    from ray._private.runtime_env.packaging import create_package

    files = {".gitignore": "data/\n*.tmp\n", "a.py": "1", "data/big": "22", "deep/x.tmp": "3", "deep/y": "4444",
             "deep/.rayignore": "z*\n!zz\n", "deep/z1": "5", "deep/zz": "6", "runs/old/r": "7",
             "m/__pycache__/m.pyc": "8", "m/runs/kept": "9"}  # fmt: skip
    for name, text in files.items():
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_text(text)
    (tmp_path / "t" / "link").symlink_to("a.py")
    create_package(str(tmp_path / "t"), tmp_path / "t.zip", include_gitignore=True, excludes=list(EXCLUDES))
    sent = {name for name in ZipFile(tmp_path / "t.zip").namelist() if not name.endswith("/")}
    assert "deep/y" in sent and "data/big" not in sent and "runs/old/r" not in sent
    assert {str(p.relative_to(tmp_path / "t")) for p in files_of(tmp_path / "t")} == sent
    tree = tree_at(tmp_path / "t")
    assert tree.files == len(sent) and tree.entries["deep"] == sum(len(files[n]) for n in sent if n.startswith("deep/"))


def test_a_folder_that_is_too_large_is_refused_with_what_is_large(tree: Path) -> None:
    (tree / "pictures").mkdir()
    with (tree / "pictures" / "all.bin").open("wb") as sparse:
        sparse.truncate(3 << 30)  # nobody reads it
    told = r"3\.2GB in .* files, .*: pictures 3\.2GB, configs .*; name .* in \.rayignore"
    with pytest.raises(ClusterError, match=told):
        submission(tree / "configs" / "sinusoid_maml.yaml", sending=Sending(tree))
    (tree / ".rayignore").write_text("pictures\n")
    submission(tree / "configs" / "sinusoid_maml.yaml", sending=Sending(tree))


def test_an_image_takes_the_place_of_the_folder_and_gets_the_config_by_environment(tmp_path: Path) -> None:
    config = ROOT / "configs" / "sinusoid_maml.yaml"
    command, runtime_env, told = packed("check", config, ["outer.steps=7"], [], Sending(tmp_path, "ghcr.io/me/it:1"))
    assert runtime_env["image_uri"] == "ghcr.io/me/it:1" and set(runtime_env) == {"image_uri", "env_vars"}
    assert told[0] == "runs in ghcr.io/me/it:1; no folder is sent"
    ran = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment(**runtime_env["env_vars"]), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "steps: 7" in ran.stdout and "type: sinusoid" in ran.stdout


def test_a_run_directory_in_the_heads_home_is_left_to_the_heads_shell(tree: Path) -> None:
    made = submission(tree / "configs" / "sinusoid_maml.yaml", ["name=mine"], "~/my runs/a", Sending(tree))
    assert "--run-dir ~/'my runs/a' --resume-if-exists" in made.entrypoint
    assert made.metadata["metadist_run_dir"] == "~/my runs/a"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NOT_SET_ANYWHERE", "--env NOT_SET_ANYWHERE: is not set here; `export"),
        ("KEY=value", "--env KEY: takes a name alone"),
        ("OMP_NUM_THREADS", "--env OMP_NUM_THREADS: is set by a run"),
    ],
)
def test_variables_that_cannot_be_sent(tree: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        submission(tree / "configs" / "sinusoid_maml.yaml", sending=Sending(tree, env=[name]))
    assert message in str(refused.value) and "value" not in str(refused.value)
