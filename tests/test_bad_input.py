"""Every way in which input is wrong gets one clear line, the right exit code, and leaves nothing behind."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from metadist.cli import main
from metadist.data import pack_arrays
from metadist.runtime.local import LocalBackend
from metadist.tracking.wandb_file import offline_runs, read_offline_run
from tests.conftest import ROOT

GLYPHS = str(ROOT / "configs" / "glyphs_maml.yaml")
SHORT = [
    "runtime.type=local",
    "engine.compile=false",
    "outer.steps=2",
    "evaluation.episodes=4",
    "evaluation.every=0",
    "tracking.wandb.mode=disabled",
]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 255, (30, 4, 28, 28), dtype=np.uint8)
    splits = {"train": list(range(10)), "validation": list(range(10, 20)), "test": list(range(20, 30))}
    pack_arrays(images, [f"k{i}" for i in range(30)], splits, tmp_path / "shards")
    return tmp_path / "shards"


def refused(tmp_path: Path, arguments: list[str], code: int, *patterns: str) -> None:
    """Runs a command that must fail with ``code`` and a message that holds every pattern."""
    run_dir = tmp_path / "run"
    if arguments[0] == "train":
        arguments = [*arguments, "--run-dir", str(run_dir)]
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(main, arguments)
    text = result.output
    assert result.exit_code == code, (result.exit_code, text, result.exception)
    assert "Traceback" not in text
    for pattern in patterns:
        assert re.search(pattern, text), f"{pattern!r} is not in {text!r}"
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"


def from_shards(shards: Path, *more: str) -> list[str]:
    config = str(ROOT / "configs" / "omniglot_5way1shot_maml.yaml")
    return [
        "train",
        config,
        f"tasks.path={shards}",
        "tasks.train_split=train",
        "tasks.rotations=none",
        *SHORT,
        *more,
    ]


@pytest.mark.parametrize(
    ("word", "patterns"),
    [
        ("outer.learning_rat=1", [r"outer\.learning_rat: there is no such field"]),
        ("outr.lr=1", [r"outr: there is no such field; did you mean outer\?"]),
        ("outer.lr=fast", [r"outer\.lr: 'fast' will not do", "number"]),
        ("tasks.ways=1.5", [r"tasks\.ways: 1\.5 will not do"]),
        ("runtime.workers=0", [r"runtime\.workers: 0 will not do", "greater than or equal to 1"]),
        ("runtime.workers=many", [r"runtime\.workers: 'many' will not do"]),
        ("runtime.workers={min: 3, max: 2}", [r"runtime\.workers: min is 3, more than max, which is 2"]),
        ("runtime.workers={min: 0, max: 2}", [r"runtime\.workers\.min: 0 will not do"]),
        ("runtime.workers={least: 1, max: 2}", [r"runtime\.workers\.least: there is no such field"]),
        ("runtime={node_sums: true, max_staleness: 1}", ["node_sums is for updates that wait", "max_staleness: 0"]),
        ("runtime={type: local, address: auto}", ["address is for type: ray; write type: ray, or address: null"]),
        ("runtime={type: ray, address: 'ray://head:10001'}", ["on a machine of the cluster", "metadist submit"]),
        ("algorithm.type=mamll", [r"algorithm\.type: there is no 'mamll'; did you mean maml\?"]),
        ("nonsense", [r"nonsense: is not of the form key\.sub=value"]),
    ],
)
def test_a_wrong_config_is_bad_usage(tmp_path, word, patterns):
    refused(tmp_path, ["train", GLYPHS, word], 2, *patterns)


def test_a_missing_config_is_bad_usage(tmp_path):
    refused(tmp_path, ["train", str(tmp_path / "no.yaml")], 2, r"no\.yaml: no such file")


def test_a_missing_shard_set(tmp_path):
    refused(tmp_path, from_shards(tmp_path / "nowhere"), 1, "nowhere", "metadist data pack")


def test_more_ways_than_classes(tmp_path, shards):
    refused(tmp_path, from_shards(shards, "tasks.ways=11"), 1, r"tasks\.ways", "11", "10")


def test_more_shots_than_a_class_holds(tmp_path, shards):
    refused(tmp_path, from_shards(shards, "tasks.shots=4"), 1, r"tasks\.shots", "5", "4")


def test_a_truncated_shard(tmp_path, shards):
    tar = next(shards.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-2000])
    refused(tmp_path, from_shards(shards), 1, re.escape(tar.name), "bytes")
    refused(tmp_path, ["data", "verify", str(shards)], 1, re.escape(tar.name))


def test_altered_bytes_in_a_shard(tmp_path, shards):
    tar = next(shards.glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[len(data) // 5] ^= 1
    tar.write_bytes(bytes(data))
    refused(tmp_path, ["data", "verify", str(shards)], 1, re.escape(tar.name))


def test_a_corrupt_image(tmp_path):
    for k in range(3):
        (tmp_path / "pictures" / f"class{k}").mkdir(parents=True)
        for i in range(3):
            Image.new("L", (30, 30), 40 * i).save(tmp_path / "pictures" / f"class{k}" / f"{i}.png")
    bad = tmp_path / "pictures" / "class1" / "2.png"
    bad.write_bytes(bad.read_bytes()[:40])
    arguments = [
        "data",
        "pack",
        "folder",
        "--source",
        str(tmp_path / "pictures"),
        "--out",
        str(tmp_path / "out"),
        "--size",
        "28",
    ]
    refused(tmp_path, arguments, 1, r"class1/2\.png")


def test_a_run_directory_that_exists(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("mine")
    refused(tmp_path, ["train", GLYPHS, *SHORT], 1, "run: exists already", "metadist resume")
    assert (tmp_path / "run" / "file").read_text() == "mine"


def test_a_run_directory_that_does_not(tmp_path):
    refused(tmp_path, ["resume", str(tmp_path / "none")], 1, "there is no such run directory")
    refused(tmp_path, ["evaluate", str(tmp_path)], 1, r"holds no config\.yaml")


def test_an_unreachable_ray_address(tmp_path):
    words = [*SHORT, "runtime.type=ray", "runtime.address=127.0.0.1:1"]
    refused(
        tmp_path,
        ["train", GLYPHS, *words],
        1,
        r"runtime\.address: no Ray cluster answers at 127\.0\.0\.1:1",
        "ray start --head",
    )


def test_an_unreachable_dashboard(tmp_path):
    refused(
        tmp_path, ["submit", GLYPHS, "--address", "http://127.0.0.1:1"], 2 if Path.cwd() != ROOT else 1, "127|outside"
    )


def test_more_gpus_than_there_are():
    from metadist.config.schema import RuntimeConfig, WorkersRange
    from metadist.errors import ClusterError
    from metadist.runtime.cluster import plan_workers

    with pytest.raises(
        ClusterError, match=r"runtime\.gpus_per_worker: 4 workers with 1 GPUs each need 4, the cluster has 2"
    ):
        plan_workers(RuntimeConfig(workers=4, gpus_per_worker=1), {"CPU": 8, "GPU": 2})
    with pytest.raises(ClusterError, match=r"a cluster that grows write workers: \{min: 1, max: 4\}"):
        plan_workers(RuntimeConfig(workers=4, gpus_per_worker=1, address="head:1"), {"CPU": 8})
    with pytest.raises(ClusterError, match=r"4 workers need 4 CPUs.*a cluster that grows write workers"):
        plan_workers(RuntimeConfig(workers=4, address="head:1"), {"CPU": 2})
    assert plan_workers(RuntimeConfig(workers=4, gpus_per_worker=0.5), {"CPU": 8, "GPU": 2}) == (4, 0.5)
    some = WorkersRange(min=1, max=9)
    assert plan_workers(RuntimeConfig(workers=some, address="head:1"), {"CPU": 2}) == (9, 0.0), "room may come"
    assert plan_workers(RuntimeConfig(workers=some), {"CPU": 2}) == (2, 0.0), "on one machine it will not"
    assert plan_workers(RuntimeConfig(workers=WorkersRange(min=4, max=9)), {"CPU": 2}) == (4, 0.0)


def test_more_gpus_than_there_are_by_command(tmp_path):
    words = [*SHORT, "runtime.type=ray", "runtime.workers=1", "runtime.gpus_per_worker=512"]
    refused(tmp_path, ["train", GLYPHS, *words], 1, r"runtime\.gpus_per_worker: 1 workers with 512 GPUs each need 512")


def test_a_gpu_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    wanted = "runtime.gpus_per_worker=0.5"
    told = [2, r"runtime\.gpus_per_worker: is 0\.5", "no GPU on this machine", "auto or 0"]
    refused(tmp_path, ["train", GLYPHS, *SHORT, wanted], *told)
    refused(tmp_path, ["bench", GLYPHS, "--rounds", "1", wanted], *told)


def test_a_model_that_does_not_fit_the_tasks(tmp_path):
    sines = str(ROOT / "configs" / "sinusoid_maml.yaml")
    refused(tmp_path, ["train", sines, "model.type=conv4", *SHORT], 2, r"model\.type: conv4 takes pictures", "use mlp")


def test_user_code_that_cannot_be_imported(tmp_path):
    words = [*SHORT, "tasks.type=custom", "tasks.import_path=nowhere.at_all:Tasks"]
    refused(
        tmp_path,
        ["train", GLYPHS, *words],
        2,
        r"tasks\.import_path: nowhere\.at_all:Tasks cannot be imported",
        "PYTHONPATH",
    )


def test_a_loss_that_is_not_finite_keeps_the_last_good_version(tmp_path):
    words = [
        *SHORT,
        "outer.steps=8",
        "outer.meta_batch_size=4",
        "outer.optimizer=sgd",
        "outer.lr=1e37",
        "checkpoint.every=1",
    ]
    words.append("tracking.wandb.mode=offline")
    run_dir = tmp_path / "run"
    result = CliRunner().invoke(main, ["train", GLYPHS, *words, "--run-dir", str(run_dir)])
    assert result.exit_code == 1
    assert re.search(
        r"step \d+: the loss or gradient of training episodes [\d, .]+ of split train is not finite", result.output
    )
    assert "warning, diverging: step" in result.output
    assert [a["title"] for a in read_offline_run(offline_runs(run_dir)[0])["alerts"]] == ["diverging"]
    version = int((run_dir / "checkpoints" / "latest").read_text())
    failed = int(re.search(r"step (\d+): the loss", result.output)[1])
    assert version == failed - 1, "the last good version is the one before the failed step"
    from metadist.checkpoint import load_checkpoint
    from metadist.storage import FolderStore

    held = load_checkpoint(FolderStore(run_dir / "checkpoints"), version)
    assert all(np.isfinite(t.numpy()).all() for t in held.meta_params.values())


def test_a_damaged_newest_checkpoint_is_passed_over_by_name(tmp_path):
    words = [*SHORT, "outer.steps=4", "outer.meta_batch_size=4", "checkpoint.every=2"]
    run_dir = tmp_path / "run"
    assert CliRunner().invoke(main, ["train", GLYPHS, *words, "--run-dir", str(run_dir)]).exit_code == 0
    damaged = run_dir / "checkpoints" / "00000004" / "meta_params.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    result = CliRunner().invoke(main, ["resume", str(run_dir)])
    assert result.exit_code == 0, result.output
    assert "passed over a damaged checkpoint" in result.output and "00000004/meta_params.safetensors" in result.output
    shutil.rmtree(run_dir / "checkpoints" / "00000004")
    shutil.rmtree(run_dir / "checkpoints" / "00000002")


def test_an_update_that_overflows_ends_the_run_at_the_last_good_version(tmp_path, monkeypatch):
    original = LocalBackend.commit

    def commit(self, version, *rest):
        if version == 2:
            raise FloatingPointError("the norm of the meta-gradient is inf")
        return original(self, version, *rest)

    monkeypatch.setattr(LocalBackend, "commit", commit)
    run_dir = tmp_path / "run"
    words = [*SHORT, "outer.steps=4", "checkpoint.every=1", "tracking.wandb.mode=disabled"]
    result = CliRunner().invoke(main, ["train", GLYPHS, *words, "--run-dir", str(run_dir)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "step 3: the norm of the meta-gradient is inf; no update was made of it" in result.output
    assert (run_dir / "checkpoints" / "latest").read_text() == "00000002\n"
