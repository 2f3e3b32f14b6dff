"""Shard sets that the tests read, and spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from shard_sets import SPLITS, images

from metadist.data import pack_arrays


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 classes of 6 images in blocks of 3, over several shards; shared, so not to be altered."""
    out = tmp_path_factory.mktemp("sets") / "packed"
    pack_arrays(images(), [f"k{i}" for i in range(12)], SPLITS, out, block_examples=3, shard_bytes=8000)
    return out


@pytest.fixture
def spoilt(packed: Path, tmp_path: Path) -> Path:
    """A copy of ``packed`` that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "spoilt"))
