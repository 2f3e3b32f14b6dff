"""Checkpoints behind a URL: of a real S3 server on this machine, and of fsspec's own file systems."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from metadist.cli import main
from metadist.storage import open_store
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("no_pictures")
SHORT = [
    "outer.steps=6", "checkpoint.every=2", "checkpoint.keep=2", "runtime.type=local", "evaluation.episodes=10",
    "tracking.console=false", "tracking.wandb.mode=disabled",
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server, by its address."""
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install metadist[s3])")
    moto = pytest.importorskip("moto.server", reason="moto, which serves S3 on this machine, is not installed")
    served = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    yield f"http://{host}:{port}"
    served.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL of a new bucket, with the environment that leads to it."""
    import boto3
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "a-secret-word",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"runs-{os.urandom(4).hex()}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/sines"


def metadist(*words: object, code: int = 0) -> str:
    told = CliRunner().invoke(main, list(map(str, words)))
    assert told.exit_code == code, (told.output, told.exc_info)
    return told.output


def train(run_dir: Path, *words: str, code: int = 0) -> str:
    return metadist("train", ROOT / "configs" / "sinusoid_maml.yaml", *SHORT, *words, "--run-dir", run_dir, code=code)


def sha(run_dir: Path) -> str:
    return str(json.loads((run_dir / "summary.json").read_text())["meta_params_sha256"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = tmp_path_factory.mktemp("here") / "run"
    train(run_dir)
    return sha(run_dir)


def check_a_life_elsewhere(url: str, undisturbed: str, folder: Path) -> None:
    """Trained, judged, gone on with, lost with its directory, and gone on with from its checkpoints alone."""
    run_dir, there = folder / "run", f"checkpoint.path={url}"
    train(run_dir, there)
    assert sha(run_dir) == undisturbed and open_store(url).versions() == [4, 6]
    assert not list((run_dir / "checkpoints").iterdir())
    assert json.loads(metadist("evaluate", run_dir, "--json"))["version"] == 6
    told = train(folder / "second", there, code=2)
    assert "holds checkpoints of another run" in told and not (folder / "second").exists()
    # Cut in the newest, and a later one that was never finished.
    with open_store(url).writing(6) as version:
        (version / "meta_params.safetensors").write_bytes(b"cut")
        (version / "state.json").write_bytes(b"{}")
    metadist("resume", run_dir)
    assert sha(run_dir) == undisturbed
    shutil.rmtree(run_dir)
    train(run_dir, there, "outer.steps=8", "--resume-if-exists")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["version"] == 8 and summary["restarts"]["driver"] == 2


def test_checkpoints_live_on_an_s3_server(bucket: str, undisturbed: str, tmp_path: Path) -> None:
    check_a_life_elsewhere(bucket, undisturbed, tmp_path)
    kept = "".join(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())
    assert bucket in kept and "a-secret-word" not in kept, "credentials stay in the environment"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "file", "memory"])
def test_checkpoints_live_in_other_places(kind: str, undisturbed: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    url = {"folder": str(elsewhere), "file": f"file://{elsewhere}", "memory": f"memory://{tmp_path.name}"}[kind]
    check_a_life_elsewhere(url, undisturbed, tmp_path)


def test_a_bucket_that_is_not_there_is_told_of_before_the_first_step_and_not_made(bucket: str, tmp_path: Path) -> None:
    import boto3

    told = train(tmp_path / "run", f"checkpoint.path={bucket.replace('runs-', 'missing-')}", code=1)
    assert "cannot be written" in told and "missing-" in told and not (tmp_path / "run").exists()
    assert not [b for b in boto3.client("s3").list_buckets()["Buckets"] if "missing" in b["Name"]]


def test_a_server_that_is_away_is_told_of_before_the_first_step(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    told = train(tmp_path / "run", f"checkpoint.path={bucket}", code=1)
    assert "cannot be read" in told and not (tmp_path / "run").exists()


def test_a_password_in_a_url_is_refused(tmp_path: Path) -> None:
    told = train(tmp_path / "run", "checkpoint.path=s3://me:word@bucket/run", code=2)
    assert "checkpoint.path" in told and "holds a password" in told and "me:word" not in told.replace("s3://me", "")
