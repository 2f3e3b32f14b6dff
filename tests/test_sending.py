"""Which checkpoints are kept beyond a run, and as what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metadist.checkpoint import FILES, save_checkpoint
from metadist.outer.gradient import Layout, sha256_of
from metadist.sending import send_checkpoints
from metadist.storage import Store, open_store
from metadist.tracking import Tracker

LAYOUT = Layout.of({"w": torch.zeros(3)})


class Keeper(Tracker):
    """Keeps what it is told of, bytes and all."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, dict[str, bytes], list[str], dict[str, Any]]] = []
        self.said: list[str] = []

    def log_checkpoint(
        self, version: int, files: Mapping[str, Path], aliases: Sequence[str], metadata: Mapping[str, Any]
    ) -> None:
        self.kept.append((version, {n: p.read_bytes() for n, p in files.items()}, list(aliases), dict(metadata)))

    def message(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(params=["folder", "url"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path if request.param == "folder" else f"file://{tmp_path}/elsewhere")


def _save(store: Store, version: int, best: bool) -> None:
    snapshot = {"version": version, "weights": np.full(3, version, np.float32), "outer_state": {}}
    save_checkpoint(store, snapshot, LAYOUT, {}, "content", {"tasks_seen": 8 * version}, keep=3, best=best)


def test_the_best_and_the_last_are_sent_whole_the_last_one_last(store: Store) -> None:
    for version, best in ((1, True), (2, True), (3, False), (4, False)):
        _save(store, version, best)
    keeper = Keeper()
    send_checkpoints(store, 4, keeper)
    assert [(version, aliases) for version, _, aliases, _ in keeper.kept] == [(2, ["best"]), (4, ["latest"])]
    for version, files, _, metadata in keeper.kept:
        assert files == {name: store.read(version, name) for name in FILES}
        sha256 = sha256_of({"w": torch.full((3,), float(version))})
        assert metadata == {"version": version, "meta_params_sha256": sha256, "content_id": "content",
                            "tasks_seen": 8 * version}  # fmt: skip
    assert keeper.said == []


def test_one_that_is_both_is_sent_once(store: Store) -> None:
    _save(store, 1, best=False)
    _save(store, 2, best=True)
    keeper = Keeper()
    send_checkpoints(store, 2, keeper)
    assert [(version, aliases) for version, _, aliases, _ in keeper.kept] == [(2, ["latest", "best"])]


def test_a_damaged_one_is_told_of_and_ends_nothing(tmp_path: Path) -> None:
    store, keeper = open_store(tmp_path), Keeper()
    _save(store, 1, best=False)
    (tmp_path / "00000001" / FILES[0]).write_bytes(b"")
    send_checkpoints(store, 1, keeper)
    assert keeper.kept == [] and len(keeper.said) == 1 and "was not kept elsewhere" in keeper.said[0]
