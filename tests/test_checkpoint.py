"""Checkpoints: every bit comes back, and what is not whole is refused by the name of its file."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors

from metadist import checkpoint as checkpoints
from metadist.checkpoint import Checkpoint, check_fits, load_checkpoint, newest_whole_checkpoint, save_checkpoint
from metadist.config.schema import OuterConfig
from metadist.errors import CheckpointError
from metadist.outer import Block, Layout, sha256_of
from metadist.server import ParameterServer
from metadist.storage import FolderStore

FILES = ("meta_params.safetensors", "outer_state.safetensors", "state.json")
PARAMS = {"w": torch.tensor([[0.1, -0.0], [1e-42, 3.0]]), "b": torch.tensor([1 / 3, 2.0])}
MIXED = {"w": PARAMS["w"], "half": torch.tensor([0.1, 0.2], dtype=torch.bfloat16)}
OPTIONS = OuterConfig(lr=0.01, steps=10).model_dump()
CONFIG = {"name": "run", "outer": {"lr": 0.01}}


def trained(steps: int, params: dict[str, torch.Tensor] = PARAMS) -> ParameterServer:
    layout = Layout.of(params)
    server = ParameterServer(layout.flatten(params).numpy(), OPTIONS)
    for version in range(steps):
        server.add(version, 1, {Block(0, 0): np.random.default_rng(version).normal(size=layout.numel)})
        server.commit(version, 1)
    return server


def save(directory: Path, steps: int, params: dict[str, torch.Tensor] = PARAMS, keep: int = 3) -> Path:
    snapshot = trained(steps, params).snapshot()
    progress = {"tasks_seen": 7 * steps}
    save_checkpoint(FolderStore(directory), snapshot, Layout.of(params), CONFIG, "data-one", progress, keep)
    return directory / f"{steps:08d}"


def load(path: Path) -> Checkpoint:
    return load_checkpoint(FolderStore(path.parent), int(path.name))


def newest(directory: Path) -> tuple[Checkpoint, list[str]]:
    return newest_whole_checkpoint(FolderStore(directory))


def listing(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


# --------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("params", [PARAMS, MIXED], ids=["float32", "mixed"])
@pytest.mark.parametrize("steps", [0, 4])
def test_every_bit_comes_back(tmp_path: Path, steps: int, params: dict[str, torch.Tensor]) -> None:
    wanted = trained(steps, params).snapshot()
    got = load(save(tmp_path, steps, params))
    assert got.version == got.snapshot["version"] == steps
    assert got.snapshot["weights"].tobytes() == wanted["weights"].tobytes()
    assert got.snapshot["weights"].dtype == wanted["weights"].dtype
    assert got.snapshot["outer_state"].keys() == wanted["outer_state"].keys()
    for name, values in wanted["outer_state"].items():
        assert got.snapshot["outer_state"][name].tobytes() == values.tobytes()
    named = Layout.of(params).unflatten(torch.from_numpy(wanted["weights"]))
    assert list(got.meta_params) == list(params)
    assert sha256_of(got.meta_params) == sha256_of(named)
    assert (got.config, got.content_id, got.progress) == (CONFIG, "data-one", {"tasks_seen": 7 * steps})


@pytest.mark.parametrize("params", [PARAMS, MIXED], ids=["float32", "mixed"])
def test_training_goes_on_as_if_nothing_had_been(tmp_path: Path, params: dict[str, torch.Tensor]) -> None:
    snapshot = load(save(tmp_path, 3, params)).snapshot
    server = ParameterServer(snapshot["weights"], OPTIONS, snapshot["version"])
    server.restore(snapshot)
    gradient = np.random.default_rng(3).normal(size=Layout.of(params).numel)
    server.add(3, 1, {Block(0, 0): gradient})
    assert server.commit(3, 1)[0].tobytes() == trained(4, params).weights().tobytes()


def test_the_files_are_the_contracts(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    assert path == tmp_path / "00000005" and listing(path) == sorted(FILES)
    assert (tmp_path / "latest").read_text() == "00000005\n"
    assert json.loads((path / "state.json").read_text())["meta_params_sha256"] == sha256_of(load(path).meta_params)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for steps in (1, 2, 3, 10):
        save(tmp_path, steps, keep=2)
    assert listing(tmp_path) == ["00000003", "00000010", "latest"]


def test_damaged_later_versions_do_not_crowd_out_the_whole_ones(tmp_path: Path) -> None:
    for steps in (1, 5, 6):
        save(tmp_path, steps)
    for damaged in ("00000005", "00000006"):
        (tmp_path / damaged / "state.json").unlink()
    save(tmp_path, 2, keep=2)
    assert newest(tmp_path)[0].version == 2


def test_a_damaged_checkpoint_of_the_same_version_is_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    whole = contents(path)
    (path / FILES[0]).write_bytes(b"")
    assert contents(save(tmp_path, 2)) == whole


# --------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("whole"), 3, MIXED)


def damaged(whole: Path, name: str, change: Callable[[bytearray], Any]) -> Path:
    """A copy of a whole checkpoint with one file changed."""
    copy = whole.parent / "copy" / whole.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    data = bytearray((copy / name).read_bytes())
    change(data)
    assert bytes(data) != (whole / name).read_bytes()
    (copy / name).write_bytes(data)
    return copy


SHARED = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SHARED
@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_any_altered_byte_is_refused_by_name(whole: Path, name: str, where: float, bits: int) -> None:
    def flip(data: bytearray) -> None:
        data[int(where * len(data))] ^= bits

    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(damaged(whole, name, flip))


@SHARED
@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_refused_by_name(whole: Path, name: str, where: float) -> None:
    def cut(data: bytearray) -> None:
        del data[int(where * len(data)) :]

    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(damaged(whole, name, cut))


@pytest.mark.parametrize("name", FILES)
def test_appended_bytes_and_a_missing_file_are_refused_by_name(whole: Path, name: str) -> None:
    copy = damaged(whole, name, lambda data: data.extend(b" "))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(copy)
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read".replace(".", r"\.")):
        load(copy)


def test_files_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    shutil.copy(first / FILES[0], second / FILES[0])
    with pytest.raises(CheckpointError, match="its checksum differs"):
        load(second)


def test_meta_parameters_that_nobody_could_have_learned_are_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    whole = save_tensors({"w": torch.zeros(2, 2, dtype=torch.int64), "b": torch.zeros(2)})
    (path / FILES[0]).write_bytes(whole)
    state = json.loads((path / FILES[2]).read_text())
    state["files"][FILES[0]] = {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    state["sha256"] = checkpoints._BLANK
    (path / FILES[2]).write_bytes(checkpoints._sealed(json.dumps(state)))
    with pytest.raises(CheckpointError, match=r"meta_params\.safetensors: meta-parameter 'w' is torch.int64"):
        load(path)


def test_a_newer_schema_is_refused_with_both_names(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "state.json"
    path.write_text(path.read_text().replace("metadist.checkpoint/1", "metadist.checkpoint/2"))
    with pytest.raises(CheckpointError, match="schema 'metadist.checkpoint/2', this version reads .*/1"):
        load(path.parent)


def test_a_checkpoint_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / "00000009")
    with pytest.raises(CheckpointError, match="is of version 1, but lies where 9 belongs"):
        load(tmp_path / "00000009")


def test_a_damaged_newest_is_passed_over_and_named(tmp_path: Path) -> None:
    for steps in (1, 2, 3):
        save(tmp_path, steps)
    (tmp_path / "00000003" / FILES[1]).write_bytes(b"cut")
    (tmp_path / "00000002" / FILES[2]).write_text("{}")
    found, faults = newest(tmp_path)
    assert found.version == 1
    assert [f"{v}/{name}" in fault for fault, v, name in zip(faults, ("00000003", "00000002"), FILES[1:], strict=True)]
    assert "00000003/outer_state.safetensors: holds 3 bytes" in faults[0] and "00000002/state.json" in faults[1]


def test_a_missing_or_wrong_latest_does_not_matter(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (tmp_path / "latest").write_text("99999999\n")
    assert newest(tmp_path)[0].version == 2
    (tmp_path / "latest").unlink()
    assert newest(tmp_path)[0].version == 2


def test_no_whole_checkpoint_says_what_is_wrong_with_each(tmp_path: Path) -> None:
    (save(tmp_path, 1) / FILES[0]).unlink()
    with pytest.raises(CheckpointError, match=r"(?s)holds no whole checkpoint.*00000001/meta_params.safetensors"):
        newest(tmp_path)
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        newest(tmp_path / "nowhere")


# --------------------------------------------------------------------------- another model, other data


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"w": torch.zeros(2, 3), "b": torch.zeros(2)}, r"w is \[2, 2\] torch.float32, wanted \[2, 3\] torch.float32"),
        ({"w": torch.zeros(2, 2), "b": torch.zeros(2).double()}, r"b is \[2\] torch.float32, wanted .* torch.float64"),
        ({"w": torch.zeros(2, 2)}, "b is not a parameter of this model"),
        ({**PARAMS, "c": torch.zeros(1)}, "c is missing"),
        ({"b": torch.zeros(2), "w": torch.zeros(2, 2)}, "another order"),
        ({f"p{i}": torch.zeros(1) for i in range(5)}, r"\(and 4 more\)"),
    ],
    ids=["shape", "dtype", "fewer", "more", "order", "many"],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, model: dict[str, torch.Tensor], named: str) -> None:
    with pytest.raises(CheckpointError, match="runs/x: is of another model: .*" + named):
        check_fits(load(save(tmp_path, 1)), Layout.of(model), None, "runs/x")


def test_other_data_is_refused_and_unnamed_data_is_not(tmp_path: Path) -> None:
    checkpoint, layout = load(save(tmp_path, 1)), Layout.of(PARAMS)
    with pytest.raises(CheckpointError, match="was trained on data data-one, but tasks now name data-two; point tasks"):
        check_fits(checkpoint, layout, "data-two", "runs/x")
    for content_id in ("data-one", None):
        assert check_fits(checkpoint, layout, content_id, "runs/x") is None


# --------------------------------------------------------------------------- a disk that fails


def fail_nth(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, nth: int) -> list[int]:
    """Lets the ``nth`` call of a function raise as a full disk does; the list counts the calls."""
    original, calls = getattr(owner, name), [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return calls


@pytest.mark.parametrize(
    ("owner", "name", "nth"),
    [(checkpoints, "save_file", 1), (checkpoints, "save_file", 2), (Path, "write_bytes", 1)]
    + [(os, "fsync", 1), (os, "fsync", 3), (os, "rename", 1)],
)
def test_a_failed_write_leaves_the_earlier_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, nth: int
) -> None:
    before = contents(save(tmp_path, 1))
    with monkeypatch.context() as patch:
        calls = fail_nth(patch, owner, name, nth)
        with pytest.raises(CheckpointError, match="00000002: cannot be written .*No space left.*before it are whole"):
            save(tmp_path, 2)
        assert calls[0] >= nth, "the fault was never injected"
    assert listing(tmp_path) == ["00000001", "latest"]
    assert contents(tmp_path / "00000001") == before
    assert (tmp_path / "latest").read_text() == "00000001\n"
    save(tmp_path, 2)
    assert newest(tmp_path)[0].version == 2


def test_no_room_for_the_tensors_is_an_error_of_the_disk(tmp_path: Path) -> None:
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(CheckpointError, match="00000002: cannot be written .*File too large"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(tmp_path) == ["00000001", "latest"] and newest(tmp_path)[0].version == 1


def test_an_interrupt_leaves_no_partial_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def interrupt(text: str) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "_sealed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert listing(tmp_path) == ["00000001", "latest"]
