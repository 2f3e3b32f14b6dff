"""Files of strangers: whatever they hold, nothing of it is run, and nothing is written outside of its place.

Each file here would leave a mark if it were run or unpacked. That the mark works is seen first, by running it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from metadist.checkpoint import _BLANK, _sealed
from tests.conftest import ROOT

SHORT = [
    "tracking.console=false",
    "outer.steps=2",
    "runtime.type=local",
    "evaluation.episodes=5",
    "tracking.wandb.mode=disabled",
]
SINES = str(ROOT / "configs" / "sinusoid_maml.yaml")


class Marks:
    """What unpickling it does: leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.command = f"touch {mark}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once something of a stranger's was run."""
    path = tmp_path / "mark"
    pickle.loads(pickle.dumps(Marks(path)))
    assert path.exists(), "the mark would not be seen"
    path.unlink()
    return path


def metadist(*words: object) -> Result:
    from metadist.cli import main

    return CliRunner().invoke(main, list(map(str, words)))


def refused(told: Result, code: int, *parts: str) -> None:
    assert isinstance(told.exception, SystemExit), told.exc_info
    assert told.exit_code == code, told.output
    for part in parts:
        assert part in told.output, f"{part!r} not in {told.output}"


# --------------------------------------------------------------------------- shard sets


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    from metadist.data import pack_arrays

    pixels = np.zeros((12, 4, 28, 28), np.uint8)
    pixels[:, :, 3] = 255
    splits = {"train": list(range(8)), "validation": [8], "test": [9, 10, 11]}
    pack_arrays(pixels, [f"k{i}" for i in range(12)], splits, tmp_path / "set", block_examples=2)
    return tmp_path / "set"


def manifest(folder: Path, **changes: Any) -> None:
    """Changes the manifest."""
    file = folder / "metadist.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def entry(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return {"name": file.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def pickled_index(shards: Path, mark: Path) -> None:
    array = np.empty(1, object)
    array[0] = Marks(mark)
    with np.load(shards / "index.npz") as index:
        columns = {k: index[k] for k in index.files}
    np.savez(shards / "index.npz", **{**columns, "n": array})
    manifest(shards, index=entry(shards / "index.npz"))


def pickle_for_index(shards: Path, mark: Path) -> None:
    (shards / "index.npz").write_bytes(pickle.dumps(Marks(mark)))
    manifest(shards, index=entry(shards / "index.npz"))


def bomb_for_index(shards: Path, mark: Path) -> None:
    with zipfile.ZipFile(shards / "index.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("class", "block", "n"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                for _ in range(64):
                    file.write(bytes(1 << 24))
    manifest(shards, index=entry(shards / "index.npz"))


def pickled_block(shards: Path, mark: Path) -> None:
    """Each payload a pickle under the extensions that webdataset would run."""
    out = io.BytesIO()
    array = np.empty(1, object)
    array[0] = Marks(mark)
    np.lib.format.write_array(out, array, allow_pickle=True)
    _rewrite(shards, lambda name, data: out.getvalue() if name.endswith(".npy") else data)


def pickle_members(shards: Path, mark: Path) -> None:
    _rewrite(shards, lambda name, data: data, extra={"c00000-0000.x.pyd": pickle.dumps(Marks(mark))})


def _rewrite(shards: Path, change: Callable[[str, bytes], bytes], extra: dict[str, bytes] | None = None) -> None:
    """Every member of every tar changed, with an index and a manifest that fit."""
    for file in sorted(shards.glob("*.tar")):
        with tarfile.open(file) as old:
            members = {m.name: old.extractfile(m).read() for m in old.getmembers()}  # type: ignore[union-attr]
        with tarfile.open(file, "w") as new:
            for name, data in {**{n: change(n, d) for n, d in members.items()}, **(extra or {})}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                new.addfile(info, io.BytesIO(data))
        with np.load(shards / "index.npz") as index:
            columns = {k: index[k].copy() for k in index.files}
        with tarfile.open(file) as made:
            for member in made.getmembers():
                key, _, kind = member.name.partition(".")
                rows = [i for i, (c, b) in enumerate(zip(columns["class"], columns["block"], strict=True))
                        if f"c{c:05d}-{b:04d}" == key]  # fmt: skip
                if rows and kind in ("json", "x.npy"):
                    data = made.extractfile(member).read()  # type: ignore[union-attr]
                    prefix = "json_" if kind == "json" else ""
                    values = {"offset": member.offset_data, "size": len(data), "crc32": zlib.crc32(data)}
                    for column, value in values.items():
                        columns[prefix + column][rows[0]] = value
        np.savez(shards / "index.npz", **columns)
    manifest(shards, shards=[entry(f) for f in sorted(shards.glob("*.tar"))], index=entry(shards / "index.npz"))


def renamed_shard(name: str) -> Callable[[Path, Path], None]:
    def change(shards: Path, mark: Path) -> None:
        manifest(shards, shards=[{**entry(next(iter(shards.glob("*.tar")))), "name": name.format(mark=mark)}])

    return change


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (pickled_index, "index.npz: is not an index"),
        (pickle_for_index, "index.npz: is not an index"),
        (bomb_for_index, "index.npz: is not an index"),
        (pickled_block, "is not a plain .npy array"),
        (renamed_shard("pipe:touch {mark}"), "is not a plain file name"),
        (renamed_shard("../../../etc/passwd.tar"), "is not a plain file name"),
        (renamed_shard("/etc/passwd.tar"), "is not a plain file name"),
        (renamed_shard("http://localhost/x.tar"), "is not a plain file name"),
    ],
    ids=["pickled index", "pickle", "zip bomb", "pickled block", "pipe", "parent", "absolute", "url"],
)
@pytest.mark.parametrize("command", [pytest.param("train", marks=pytest.mark.slow), "verify"])
def test_a_shard_set_is_refused(
    shards: Path, mark: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], told: str, command: str
) -> None:
    spoil(shards, mark)
    if command == "verify":
        done = metadist("data", "verify", shards)
    else:
        words = ["tasks.type=shards", f"tasks.path={shards}", "tasks.ways=2", "tasks.shots=1", "tasks.query_shots=1"]
        words += ["model.type=conv4", "model.filters=4", "engine.compile=false", "tasks.train_split=train"]
        done = metadist("train", ROOT / "configs" / "glyphs_maml.yaml", *words, *SHORT, "--run-dir", tmp_path / "run")
    refused(done, 1, told)
    assert not mark.exists() and not (tmp_path / "run").exists()


def test_members_that_a_stock_reader_would_run_are_not_looked_at(shards: Path, mark: Path) -> None:
    pickle_members(shards, mark)
    refused(metadist("data", "verify", shards), 1, "set: ")
    from metadist.data import ShardSet

    assert ShardSet(shards).read(0).shape == (2, 28, 28)
    assert not mark.exists()


@pytest.mark.parametrize("path", ["pipe:touch {mark}", "pipe:touch {mark} |", "../nowhere", "http://localhost:1/x"])
def test_a_path_of_tasks_is_a_path_and_nothing_else(mark: Path, tmp_path: Path, path: str) -> None:
    text = (ROOT / "configs" / "omniglot_5way1shot_maml.yaml").read_text()
    config = tmp_path / "theirs.yaml"
    config.write_text(text.replace("data/omniglot", '"' + path.format(mark=mark) + '"'))
    refused(metadist("train", config, *SHORT, "--run-dir", tmp_path / "run"), 1, "no such shard set")
    assert not mark.exists()


# --------------------------------------------------------------------------- checkpoints and run directories


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("theirs") / "run"
    done = metadist("train", SINES, *SHORT, "--run-dir", run_dir)
    assert done.exit_code == 0, done.output
    return run_dir


@pytest.fixture
def theirs(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "theirs"))


def sealed(run_dir: Path, name: str, data: bytes) -> None:
    """Puts a file into the newest checkpoint, with checksums that fit."""
    folder = run_dir / "checkpoints" / "00000002"
    (folder / name).write_bytes(data)
    state = json.loads((folder / "state.json").read_text())
    state["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    state["sha256"] = _BLANK
    (folder / "state.json").write_bytes(_sealed(json.dumps(state)))
    shutil.rmtree(run_dir / "checkpoints" / "00000000")


def torch_pickle(mark: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"w": Marks(mark)}, out)
    return out.getvalue()


@pytest.mark.parametrize("name", ["meta_params.safetensors", "outer_state.safetensors"])
@pytest.mark.parametrize(
    "data",
    [
        lambda mark: pickle.dumps(Marks(mark)),
        torch_pickle,
        lambda mark: (1 << 40).to_bytes(8, "little") + b"{}",
        lambda mark: (2).to_bytes(8, "little") + b"{}" * 3,
    ],
    ids=["pickle", "torch.save", "huge header", "header that lies"],
)
def test_a_checkpoint_is_refused(theirs: Path, mark: Path, name: str, data: Callable[[Path], bytes]) -> None:
    sealed(theirs, name, data(mark))
    for command in ("evaluate", "resume"):
        refused(metadist(command, theirs), 1, f"{name}: is not a safetensors file")
    assert not mark.exists()


def test_a_state_that_fills_the_memory_is_refused(theirs: Path) -> None:
    shutil.rmtree(theirs / "checkpoints" / "00000000")
    with (theirs / "checkpoints" / "00000002" / "state.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse: it takes no room on the disk
    refused(metadist("evaluate", theirs), 1, "state.json: holds more than 256 MB")


def edited(run_dir: Path, old: str, new: str) -> None:
    file = run_dir / "config.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("command", ["evaluate", "resume"])
def test_code_that_a_run_directory_names_is_not_run(theirs: Path, mark: Path, tmp_path: Path, command: str) -> None:
    text = (theirs / "config.yaml").read_text()
    section = text[text.index("tasks:") : text.index("model:")]
    call = json.dumps({"command": f"touch {mark}"})
    edited(theirs, section, f"tasks: {{type: custom, import_path: 'os:system', args: {call}}}\n")
    refused(metadist(command, theirs), 2, "tasks.import_path: is os:system, code that this would run", "--allow-code")
    assert not mark.exists()
    refused(metadist(command, theirs, "--allow-code"), 2, "made a int")
    assert mark.exists(), "the check sees it run where it is allowed"


def test_code_that_a_config_names_as_its_loss_is_not_run(
    mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nloss = None\n")
    config = tmp_path / "theirs.yaml"
    config.write_text(Path(SINES).read_text().replace("algorithm: {", "algorithm: {loss: 'evil:loss', "))
    words = ["train", config, *SHORT, "--run-dir", tmp_path / "run"]
    refused(metadist(*words), 2, "algorithm.loss: is evil:loss")
    assert not mark.exists()
    metadist(*words, "--allow-code")
    assert mark.exists(), "the check sees it run where it is allowed"


def test_tags_that_make_objects_are_not_yaml(mark: Path, tmp_path: Path, theirs: Path) -> None:
    evil = f"name: !!python/object/apply:os.system ['touch {mark}']\n"
    (tmp_path / "theirs.yaml").write_text(evil)
    (theirs / "config.yaml").write_text(evil)
    refused(metadist("train", tmp_path / "theirs.yaml"), 2, "is not YAML")
    refused(metadist("evaluate", theirs), 2, "is not YAML")
    assert not mark.exists()


def test_modules_in_the_current_folder_do_not_get_in_the_way(theirs: Path, mark: Path) -> None:
    for name in ("yaml", "torch", "numpy", "metadist_plugins", "sitecustomize"):
        (theirs / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\n")
    command = [str(Path(sys.executable).with_name("metadist")), "evaluate", ".", "--episodes", "5"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=theirs, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert not mark.exists()


def test_a_run_directory_cannot_write_elsewhere(theirs: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for name in ("00000001", "00000002"):
        (mine / name).mkdir(parents=True)
        (mine / name / "precious").write_text("kept")
    edited(theirs, "path: null", f"path: {mine}")
    before = sorted(p.relative_to(mine) for p in mine.rglob("*"))
    refused(
        metadist("resume", theirs, "outer.steps=4"), 1, f"writes its checkpoints to {mine}, which is not this run's"
    )
    assert sorted(p.relative_to(mine) for p in mine.rglob("*")) == before


def test_a_url_that_is_a_command_is_a_url_of_no_known_kind(theirs: Path, mark: Path) -> None:
    edited(theirs, "path: null", f"path: 'pipe://touch {mark}'")
    refused(metadist("evaluate", theirs), 2, "checkpoint.path: is 'pipe://touch")
    assert not mark.exists()
