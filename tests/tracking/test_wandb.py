"""The real client, offline; what it wrote is read back."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from metadist.errors import DataError, TrackingError
from metadist.tracking import RunInfo, WandbTracker
from metadist.tracking.wandb import automatic_mode, has_account, masked, panel
from metadist.tracking.wandb_file import has_ended, offline_runs, read_offline_run

EVALUATION = {"split": "test", "episodes": 600, "metric": "accuracy", "pre_adaptation": 0.2, "mean": 0.95, "ci95": 0.01,
              "batchnorm": "transductive"}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("WANDB", "_WANDB"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def _step(version: int) -> dict[str, object]:
    return {"loss": 1 / version, "accuracy": 0.5, "pre_adaptation_loss": 1.6, "pre_adaptation_accuracy": 0.2,
            "grad_norm": 0.3, "tasks_per_s": 60.0, "step_s": 0.2, "data_wait_s": 0.01, "server_s": 0.002,
            "staleness": 0, "workers": 2, "worker_s": {"0": 0.11, "1": 0.12},
            "utilisation": {"0": 0.55, "1": 0.6}, "restarts": {"worker": 0, "server": 1},
            "gpu": {"0": {"utilisation": 0.5, "memory_mb": 7.0}}}  # fmt: skip


def test_an_offline_run_holds_everything_and_a_resume_continues_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    picture, run_dir = tmp_path / "a.png", tmp_path / "run"
    run_dir.mkdir()
    Image.new("L", (8, 8)).save(picture)
    config = {"seed": 3, "outer": {"lr": 0.001}, "data": {"api_key": "hunter2"}}
    first = WandbTracker(tags=("a",))
    first.start(RunInfo(run_dir, name="glyphs", config=config, total_steps=4))
    assert first.mode == "offline" and first.run_id
    for version in (1, 2):
        first.log(version, _step(version))
    first.log_evaluation(2, EVALUATION)
    first.log_picture("episodes", picture)
    first.finish({}, 1)

    second = WandbTracker(mode="offline")
    second.start(RunInfo(run_dir, name="glyphs", config=config, start_version=2, wandb_run_id=first.run_id))
    assert second.run_id == first.run_id
    second.log(3, _step(3))
    second.finish({"version": 3, "evaluation": {"mean": 0.95}, "restarts": {"worker": 1}}, 0)

    one, two = map(read_offline_run, offline_runs(run_dir))
    assert one["run_id"] == two["run_id"] == first.run_id
    assert (one["name"], one["project"]) == ("glyphs", "metadist")
    assert one["config"]["seed"] == 3 and one["config"]["outer"] == {"lr": 0.001}
    rows = [row for row in one["history"] if "learning/loss" in row]
    assert [row["outer_step"] for row in rows] == [1, 2]
    wanted = {"learning/loss": 0.5, "learning/accuracy": 0.5, "learning/pre_adaptation_loss": 1.6,
              "learning/pre_adaptation_accuracy": 0.2, "learning/grad_norm": 0.3, "throughput/tasks_per_s": 60.0,
              "time/step_s": 0.2, "time/data_wait_s": 0.01, "time/server_s": 0.002, "staleness/staleness": 0,
              "workers/workers": 2, "workers/0_s": 0.11, "workers/1_s": 0.12, "workers/1_utilisation": 0.6,
              "restarts/server": 1, "gpus/0_utilisation": 0.5, "gpus/0_memory_mb": 7.0}  # fmt: skip
    assert {k: rows[1][k] for k in wanted} == wanted
    judged = next(row for row in one["history"] if "evaluation/test_accuracy" in row)
    assert (judged["evaluation/test_accuracy"], judged["evaluation/test_pre_adaptation_accuracy"]) == (0.95, 0.2)
    assert (judged["outer_step"], judged["evaluation/test_episodes"]) == (2, 600)
    assert any(row.get("pictures/episodes", {}).get("_type") == "image-file" for row in one["history"])
    assert [row["outer_step"] for row in two["history"] if "learning/loss" in row] == [3]
    assert two["summary"]["evaluation/mean"] == 0.95 and two["summary"]["restarts/worker"] == 1
    _assert_discreet(run_dir, capfd)


def _assert_discreet(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing printed, no code and no secret kept, nothing for a child process to inherit."""
    said = capfd.readouterr()
    assert said.out == said.err == ""
    assert not list(run_dir.rglob("*.py")) and not list(run_dir.rglob("diff.patch"))
    assert all(b"hunter2" not in p.read_bytes() for p in run_dir.rglob("*") if p.is_file())
    assert not [n for n in os.environ if n.startswith(("WANDB_SERVICE", "_WANDB"))]


def test_alerts_are_kept_and_a_checkpoints_config_is_not_sent_if_it_holds_a_secret(tmp_path: Path) -> None:
    state, tensors = tmp_path / "state.json", tmp_path / "meta_params.safetensors"
    state.write_text('{"config": {"api_key": "hunter2"}}')
    tensors.write_bytes(b"x")
    files = {"meta_params.safetensors": tensors, "state.json": state}
    for config, sent in (({"api_key": "hunter2"}, {"meta_params.safetensors"}), ({"seed": 1}, set(files))):
        run_dir = tmp_path / str(len(sent))
        run_dir.mkdir()
        tracker = WandbTracker()
        tracker.start(RunInfo(run_dir, config=config, code={"metadist": "1", "commit": "c0ffee"}, content_id="abc"))
        tracker.alert("diverging", "the loss is high")
        tracker.log_checkpoint(3, files, ["latest", "best"], {"version": 3})
        tracker.finish({}, 0)
        (file,) = offline_runs(run_dir)
        run = read_offline_run(file)
        assert run["alerts"] == [{"title": "diverging", "text": "the loss is high"}]
        (artifact,) = run["artifacts"]
        assert set(artifact["files"]) == sent and sorted(artifact["aliases"]) == ["best", "latest"]
        assert artifact["metadata"] == {"version": 3}
        assert run["config"]["code"]["commit"] == "c0ffee" and run["config"]["data"] == {"content_id": "abc"}
    assert "WANDB_DATA_DIR" not in os.environ


@pytest.mark.parametrize("rows", [1, pytest.param(2000, marks=pytest.mark.slow)])
def test_an_offline_run_is_whole_once_it_is_finished(tmp_path: Path, rows: int) -> None:
    tracker = WandbTracker(mode="offline")
    tracker.start(RunInfo(tmp_path))
    for version in range(1, rows + 1):
        tracker.log(version, _step(version))
    assert read_offline_run(*offline_runs(tmp_path))["exit_code"] is None
    tracker.finish({}, 3)
    (file,) = offline_runs(tmp_path)
    run = read_offline_run(file)
    assert (run["exit_code"], len(run["history"])) == (3, rows) and has_ended(file)
    cut = tmp_path / "cut.wandb"
    for size in range(max(7, file.stat().st_size - 400), file.stat().st_size - 1, 13):
        cut.write_bytes(file.read_bytes()[:size])
        assert has_ended(cut) == (read_offline_run(cut)["exit_code"] is not None) and not has_ended(cut)


def test_a_client_that_writes_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter((False, OSError("not there yet"), DataError(tmp_path, "is damaged"), True))
    seen: list[object] = []

    def looked(file: Path) -> bool:
        seen.append(found := next(looks))
        if isinstance(found, Exception):
            raise found
        return bool(found)

    monkeypatch.setattr("metadist.tracking.wandb.has_ended", looked)
    tracker = WandbTracker(mode="offline")
    tracker.start(RunInfo(tmp_path))
    tracker.finish({}, 0)
    assert seen[-1] is True and len(seen) == 4


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    code = f"""
import os, signal, time
from pathlib import Path
from metadist.tracking import RunInfo, WandbTracker
t = WandbTracker(mode="offline")
t.start(RunInfo(Path({str(tmp_path)!r})))
for v in range(1, 21):
    t.log(v, {{"loss": 1.0}})
time.sleep(2.5)
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=False, capture_output=True)
    (file,) = offline_runs(tmp_path)
    assert [row["outer_step"] for row in read_offline_run(file)["history"]] == list(range(1, 21))


def test_nothing_is_written_when_disabled(tmp_path: Path) -> None:
    tracker = WandbTracker(mode="disabled")
    tracker.start(RunInfo(tmp_path))
    tracker.log(1, _step(1))
    tracker.log_evaluation(1, EVALUATION)
    tracker.log_picture("a", tmp_path / "missing.png")
    tracker.finish({}, 0)
    assert tracker.run_id is None and list(tmp_path.iterdir()) == []


def test_online_without_an_account_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"^tracking\.wandb\.mode: is online, but no account is set up; run `wandb"):
        WandbTracker(mode="online").start(RunInfo(tmp_path))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(TrackingError, match="tracking.wandb.mode: is 'onlin'; choose one of auto, online"):
        WandbTracker(mode="onlin")


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrackingError, match="the package wandb is not installed; run `pip install wandb`"):
        WandbTracker(mode="offline").start(RunInfo(tmp_path))


def test_a_folder_that_is_missing_is_an_error_not_a_temporary_folder(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"tracking\.wandb: cannot be started \(PermissionError"):
        WandbTracker(mode="offline").start(RunInfo(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "x"}, "online"),
        ({"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_API_KEY": "x", "WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_API_KEY": "x", "WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_MODE": "online"}, "offline"),
    ],
)
def test_auto_goes_online_only_with_an_account(
    environment: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert automatic_mode() == mode


def test_an_account_is_found_where_login_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    assert has_account()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_account()
    monkeypatch.delenv("WANDB_BASE_URL")
    (tmp_path / "netrc").write_text("not a netrc at all {")
    assert not has_account()


def test_names_fall_into_panels() -> None:
    assert [panel(n) for n in ("loss", "mean_squared_error", "apply_s", "tasks_per_s", "evaluation/x")] == [
        "learning/loss", "learning/mean_squared_error", "time/apply_s", "throughput/tasks_per_s", "evaluation/x",
    ]  # fmt: skip


def test_secrets_are_masked_at_any_depth_and_settings_are_not() -> None:
    config = {"a": {"s3_secret": "x", "token": "y"}, "keys": 3, "monkey": "z", "ways": 5}
    assert masked(config) == {"a": {"s3_secret": "***", "token": "***"}, "keys": 3, "monkey": "z", "ways": 5}


def _log_file(records: list[bytes]) -> bytes:
    """Records in LevelDB's framing, written by the book."""
    out = bytearray(b":W&B" + struct.pack("<HB", 0xBEE1, 0))
    for record in records:
        first = True
        while True:
            room = 32768 - len(out) % 32768
            if room < 7:
                out += bytes(room)
                room = 32768
            piece, record = record[: room - 7], record[room - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not record]
            out += struct.pack("<IHB", zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece
            first = False
            if not record:
                break
    return bytes(out)


def _history(row: dict[str, object]) -> bytes:
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()
    for key, value in row.items():
        item = record.history.item.add()
        item.value_json = json.dumps(value)
        if isinstance(value, dict):
            item.nested_key.extend([key, "b", "c"])
            item.value_json = json.dumps(value["b"]["c"])
        else:
            item.key = key
    return bytes(record.SerializeToString())


def test_records_over_several_blocks_and_cut_ends_are_read(tmp_path: Path) -> None:
    rows = [{"n": n, "a": {"b": {"c": "x" * size}}} for n, size in enumerate([10, 32700, 5, 100_000, 32735, 3])]
    data, file = _log_file([_history(row) for row in rows]), tmp_path / "run-a.wandb"
    file.write_bytes(data)
    assert read_offline_run(file)["history"] == rows
    assert read_offline_run(tmp_path)["history"] == rows
    file.write_bytes(data[:-4])
    assert read_offline_run(file)["history"] == rows[:-1]
    file.write_bytes(data[:60_000])
    assert read_offline_run(file)["history"] == rows[:3]


def test_damage_and_other_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "run-a.wandb"
    damaged = bytearray(_log_file([_history({"n": 1}), _history({"n": 2})]))
    damaged[16] ^= 1
    file.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"run-a\.wandb: is damaged at byte 7$"):
        read_offline_run(file)
    file.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(DataError, match="is no offline run of Weights & Biases"):
        read_offline_run(file)
    with pytest.raises(DataError, match=r"holds 0 \.wandb files; name one offline run"):
        read_offline_run(tmp_path / "missing.wandb")
