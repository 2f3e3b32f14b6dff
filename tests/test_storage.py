"""Stores: one behaviour in a folder, in memory and behind a URL; what a kill leaves is never taken for a version."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from metadist.checkpoint import best_of, load_checkpoint, newest_whole_checkpoint, save_checkpoint
from metadist.errors import CheckpointError, ConfigError
from metadist.outer import Layout
from metadist.storage import FolderStore, Store, UrlStore, open_store

PARAMS = {"w": torch.tensor([1.0, 2.0])}
FILES = {"a.bin": b"one", "state.json": b"{}"}


@pytest.fixture(params=["folder", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    where = f"memory://{uuid.uuid4().hex}/run"
    yield open_store({"folder": tmp_path / "run", "file": f"file://{tmp_path}/run", "memory": where}[request.param])
    fsspec.filesystem("memory").store.clear()


def save(store: Store, version: int, keep: int = 2, best: bool = False) -> None:
    snapshot = {"version": version, "weights": np.full(2, version, "float32"), "outer_state": {}}
    save_checkpoint(store, snapshot, Layout.of(PARAMS), {"name": "run"}, None, {"tasks_seen": version}, keep, best)


def put(store: Store, version: int, files: dict[str, bytes]) -> None:
    with store.writing(version) as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)


def test_a_version_comes_back_and_can_be_replaced(store: Store) -> None:
    assert store.versions() == [] and store.noted("latest") is None
    put(store, 7, FILES)
    put(store, 7, {"a.bin": b"three", "state.json": b"[]"})
    with pytest.raises(ZeroDivisionError), store.writing(7) as folder:
        (folder / "a.bin").write_bytes(b"four")
        raise ZeroDivisionError
    store.note("latest", "00000007")
    assert store.versions() == [7] and store.noted("latest") == "00000007"
    assert (store.read(7, "a.bin"), store.size(7, "a.bin")) == (b"three", 5)
    with pytest.raises(OSError):
        store.read(8, "a.bin")
    store.remove(7)
    store.remove(8)
    assert store.versions() == []


def test_checkpoints_are_kept_by_their_number_and_the_best_besides(store: Store) -> None:
    for version in (2, 4, 6, 10):
        save(store, version, best=version == 4)
    assert store.versions() == [4, 6, 10]
    assert (best_of(store), store.noted("latest")) == (4, "00000010")
    save(store, 12, best=True)
    assert store.versions() == [10, 12]
    found, faults = newest_whole_checkpoint(store)
    assert found.version == 12 and not faults and found.meta_params["w"].tolist() == [12.0, 12.0]


def test_what_was_cut_is_passed_over_by_its_place(store: Store, tmp_path: Path) -> None:
    for version in (1, 2):
        save(store, version)
    state = store.read(2, "state.json")
    tensors = {n: store.read(2, n) for n in ("meta_params.safetensors", "outer_state.safetensors")}
    put(store, 2, {**tensors, "meta_params.safetensors": b"cut", "state.json": state})
    found, faults = newest_whole_checkpoint(store)
    assert found.version == 1 and "00000002/meta_params.safetensors: holds 3 bytes" in faults[0]


class Broken:
    """A file system whose nth write of a file fails, as ``error``."""

    def __init__(self, fs: Any, nth: int, error: Exception) -> None:
        self._fs, self._left, self._error = fs, nth, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    def put_file(self, *args: Any) -> None:
        self._left -= 1
        if self._left == 0:
            raise self._error
        self._fs.put_file(*args)


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("token expired\nlong text")])
def test_a_url_holds_no_version_that_was_cut_short(tmp_path: Path, nth: int, error: Exception) -> None:
    store = UrlStore(f"file://{tmp_path}/run")
    save(store, 1)
    whole, store._fs = store._fs, Broken(store._fs, nth, error)
    with pytest.raises(CheckpointError, match="00000002: cannot be written .*before it are whole") as told:
        save(store, 2)
    assert "long text" not in str(told.value)
    store._fs = whole
    assert store.versions() == [1]
    save(store, 2)
    assert load_checkpoint(store, 2).version == 2


def test_a_version_that_is_written_again_is_absent_meanwhile(tmp_path: Path) -> None:
    store = UrlStore(f"file://{tmp_path}/run")
    save(store, 1)
    store._fs = Broken(store._fs, 1, OSError(28, "No space left on device"))
    with pytest.raises(CheckpointError):
        save(store, 1)
    assert store.versions() == []


def test_kinds_of_url_that_nobody_knows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.path: is 'nosuch://a/b'.*name a folder, or a URL"):
        open_store("nosuch://a/b")
    assert isinstance(open_store("some/folder"), FolderStore)
