"""What every test may use."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A first call may build or trace something, and machines are busy.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

ROOT = Path(__file__).resolve().parent.parent


FIRST = ("ray", "test_examples.py", "test_readme.py", "test_shipped_configs.py", "algorithms/test_runs.py")
"""What takes longest: begun last, it would keep one process busy while the others have nothing left to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For ``pytest -n``: a file is run by one process, and so is all of ``tests/ray``, one test after the other."""
    groups = {}
    for item in items:
        inner = item.path.relative_to(ROOT / "tests")
        groups[item] = "ray" if inner.parts[0] == "ray" else str(inner)
        item.add_marker(pytest.mark.xdist_group(groups[item]))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: FIRST.index(groups[item]) if groups[item] in FIRST else len(FIRST))


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
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process end without report and pictures, which take longer than a tiny run does."""
    monkeypatch.setattr("metadist.training._Training._pictures", lambda self, meta_params: None)


@pytest.fixture(autouse=True)
def _quiet_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One CPU thread, and no account of the person who runs the tests."""
    torch.set_num_threads(1)
    monkeypatch.setenv("WANDB_MODE", "offline")
