"""What every test may use."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# A first call may build or trace something, and machines are busy.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

ROOT = Path(__file__).resolve().parent.parent


FIRST = ("ray", "test_examples.py", "test_readme.py", "test_shipped_configs.py", "algorithms/test_runs.py")
"""What takes longest: begun last, it would keep one process busy while the others have nothing left to do."""


def group_of(nodeid: str) -> str:
    """What one process runs, one test after the other: a file, and all of ``tests/ray``."""
    file = nodeid.partition("::")[0]
    return "ray" if file.startswith("tests/ray/") else file.removeprefix("tests/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        groups = {item: group_of(item.nodeid) for item in items}
        items.sort(key=lambda item: FIRST.index(groups[item]) if groups[item] in FIRST else len(FIRST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For ``pytest -n``: tests are shared out by :func:`group_of`.

    Not by the mark ``xdist_group``: xdist 3.8 writes it where pytest 9.2 no longer looks, and the tests of a file, with
    what its fixtures make, were in every process.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


@pytest.fixture(scope="session")
def metadist_data() -> Path:
    """The folder of real data sets, from METADIST_DATA."""
    value = os.environ.get("METADIST_DATA")
    if not value:
        pytest.skip("METADIST_DATA names no folder of data sets")
    return Path(value)


@pytest.fixture(scope="session")
def omniglot_shards(metadist_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Omniglot as shards, packed once, also where several processes share the tests."""
    from metadist.data import pack_omniglot

    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    out = shared / "omniglot"
    with (shared / "omniglot.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "metadist.json").exists():
            pack_omniglot(metadist_data / "omniglot", out, splits_dir=metadist_data / "omniglot-splits")
    return out


@pytest.fixture
def devtools(tmp_path: Path) -> Iterator[str]:
    """The address of a browser's DevTools."""
    from tests.browser import running

    with running(tmp_path) as address:
        yield address


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process end without report and pictures, which take longer than a tiny run does."""
    monkeypatch.setattr("metadist.loop.show_run", lambda *of_the_run: None)


@pytest.fixture(autouse=True)
def _quiet_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One CPU thread, and no account of the person who runs the tests."""
    torch.set_num_threads(1)
    monkeypatch.setenv("WANDB_MODE", "offline")
