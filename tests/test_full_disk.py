"""A disk that fills: the run goes on and says so, or stops where it is told to; what was written before is whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from metadist.checkpoint import load_checkpoint
from metadist.cli import main
from metadist.storage import FolderStore
from metadist.tracking import JsonlTracker
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("no_pictures")
STEPS = 12
OPTIONS = {
    "outer.steps": STEPS, "checkpoint.every": 2, "checkpoint.keep": 10, "runtime.type": "local",
    "evaluation.episodes": 10, "tracking.wandb.mode": "disabled", "engine.compile": "false",
}  # fmt: skip


def train(run_dir: Path, **changes: Any) -> Result:
    words = [f"{k}={v}" for k, v in {**OPTIONS, **changes}.items()]
    return metadist("train", ROOT / "configs" / "sinusoid_maml.yaml", *words, "--run-dir", run_dir)


def metadist(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


def summary(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "summary.json").read_text()))


def steps_of(run_dir: Path) -> list[int]:
    return [json.loads(line)["version"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def whole(run_dir: Path) -> list[int]:
    """The versions that are there; each is read and checked."""
    store = FolderStore(run_dir / "checkpoints")
    for version in store.versions():
        load_checkpoint(store, version)
    assert not list((run_dir / "checkpoints").glob(".*")), "something half written is left"
    return store.versions()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(run_dir).exit_code == 0
    return str(summary(run_dir)["meta_params_sha256"])


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Versions whose checkpoint finds no room, with some of it written."""
    versions: set[int] = set()
    original = Path.write_bytes

    def write(self: Path, data: bytes) -> int:
        if self.parent.name.startswith(".") and int(self.parent.name[1:9]) in versions and self.name == "state.json":
            original(self, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    return versions


def test_the_run_goes_on_and_says_so(full_at: set[int], tmp_path: Path, undisturbed: str) -> None:
    full_at |= {4, 6}
    told = train(tmp_path / "run")
    assert told.exit_code == 0, told.output
    assert told.output.count("a checkpoint was not written") == 2 and "No space left" in told.output
    found = summary(tmp_path / "run")
    assert found["meta_params_sha256"] == undisturbed and found["checkpoints_failed"] == 2
    assert whole(tmp_path / "run") == [0, 2, 8, 10, 12] and steps_of(tmp_path / "run") == list(range(1, STEPS + 1))


def test_it_stops_where_it_is_told_to_and_is_resumed_to_the_same_bits(
    full_at: set[int], tmp_path: Path, undisturbed: str
) -> None:
    full_at |= {4}
    told = train(tmp_path / "run", **{"checkpoint.on_error": "stop"})
    assert told.exit_code == 1 and "00000004" in told.output and "No space left" in told.output
    assert isinstance(told.exception, SystemExit) and whole(tmp_path / "run") == [0, 2]
    full_at.clear()
    assert metadist("resume", tmp_path / "run").exit_code == 0
    assert summary(tmp_path / "run")["meta_params_sha256"] == undisturbed
    assert steps_of(tmp_path / "run") == list(range(1, STEPS + 1))


def test_a_last_checkpoint_that_cannot_be_written_is_a_failure(
    full_at: set[int], tmp_path: Path, undisturbed: str
) -> None:
    full_at |= {STEPS}
    told = train(tmp_path / "run")
    assert told.exit_code == 1 and "00000012" in told.output and whole(tmp_path / "run") == [0, 2, 4, 6, 8, 10]
    full_at.clear()
    assert metadist("resume", tmp_path / "run").exit_code == 0
    assert summary(tmp_path / "run")["meta_params_sha256"] == undisturbed


def test_a_run_that_cannot_write_at_all_leaves_nothing(full_at: set[int], tmp_path: Path) -> None:
    full_at |= {0}
    told = train(tmp_path / "run")
    assert told.exit_code == 1 and "cannot be written" in told.output and not (tmp_path / "run").exists()


@contextlib.contextmanager
def small_disk(at: Path, size: str) -> Iterator[Path]:
    at.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(at)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system can be mounted by the superuser alone")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def test_a_real_disk_that_is_full_for_some_steps(
    tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        filler, log = disk / "filler", JsonlTracker.log

        def filling(self: JsonlTracker, version: int, metrics: Mapping[str, Any]) -> None:
            if version == 5:
                with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(512))
            if version == 9:
                os.unlink(filler)
            log(self, version, metrics)

        monkeypatch.setattr(JsonlTracker, "log", filling)
        told = train(disk / "run")
        assert told.exit_code == 0, told.output
        assert told.output.count("a checkpoint was not written") == 2, "the disk was never full"
        assert summary(disk / "run")["meta_params_sha256"] == undisturbed
        assert whole(disk / "run") == [0, 2, 4, 10, 12]
        assert steps_of(disk / "run") == list(range(1, STEPS + 1)), "lines wait until there is room"
