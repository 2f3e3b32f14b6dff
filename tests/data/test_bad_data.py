"""Data that cannot be read: an error by default, or left out from the start, counted by class, up to a share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from shard_sets import flip

from metadist.cli import main
from metadist.data import ShardSet, bad_blocks, class_of, load_manifest, pack_arrays, pack_folder
from metadist.errors import DataError
from metadist.tasks.shards import ShardTasks
from tests.conftest import ROOT

CLASSES, EXAMPLES = 20, 6


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """20 classes in blocks of two, over several tars."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (CLASSES, EXAMPLES, 8, 8), dtype=np.uint8)
    splits = {"train": list(range(12)), "validation": [12, 13, 14], "test": [15, 16, 17, 18, 19]}
    names = [f"k{i}" for i in range(CLASSES)]
    pack_arrays(pixels, names, splits, tmp_path / "set", block_examples=2, shard_bytes=20_000)
    return tmp_path / "set"


def spoil(shards: Path, *blocks: int) -> list[str]:
    """Alters a byte of some blocks' pixels; their keys."""
    whole = ShardSet(shards)
    for b in blocks:
        shard = shards / whole.manifest.shards[int(whole.index["shard"][b])].name
        flip(shard, int(whole.index["offset"][b]) + 130)
    return [whole.index.key(b) for b in blocks]


def train(shards: Path, run_dir: Path, **changes: Any) -> Any:
    options = {
        "tasks.type": "shards", "tasks.path": shards, "tasks.ways": 3, "tasks.shots": 1, "tasks.query_shots": 1,
        "model.type": "mlp", "outer.steps": 3, "runtime.type": "local", "evaluation.episodes": 5,
        "engine.compile": "false", "tracking.wandb.mode": "disabled", "tasks.train_split": "train",
    }  # fmt: skip
    words = [f"{k}={v}" for k, v in {**options, **changes}.items()]
    return CliRunner().invoke(
        main, ["train", str(ROOT / "configs/glyphs_maml.yaml"), *words, "--run-dir", str(run_dir)]
    )


def test_a_scan_names_each_bad_block_and_what_is_wrong(shards: Path) -> None:
    assert bad_blocks(shards) == {}
    keys = spoil(shards, 4, 31)
    told: list[tuple[int, int]] = []
    found = bad_blocks(shards, lambda done, total: told.append((done, total)))
    assert list(found) == keys and all("altered" in why for why in found.values())
    assert [class_of(k) for k in keys] == [1, 10] and told[-1] == (60, 60)


def test_cut_and_missing_shards_are_blocks_that_cannot_be_read(shards: Path) -> None:
    whole = ShardSet(shards)
    first, second = (shards / whole.manifest.shards[i].name for i in (0, 1))
    wanted = {whole.index.key(int(b)) for b in np.flatnonzero(whole.index["shard"] == 1)}
    second.unlink()
    ends = (whole.index["offset"] + whole.index["size"])[whole.index["shard"] == 0]
    os.truncate(first, int(np.sort(ends)[-2]))
    wanted.add(whole.index.key(int(np.argmax(np.where(whole.index["shard"] == 0, whole.index["offset"], -1)))))
    assert set(bad_blocks(shards)) == wanted
    with pytest.raises(DataError, match="is cut"):
        ShardSet(shards)


def test_what_is_left_out_is_never_drawn_and_changes_the_identity(shards: Path) -> None:
    keys = spoil(shards, 0, 1, 2, 4)  # all of class 0, one of class 1
    with pytest.raises(DataError, match="altered"):
        ShardTasks(shards, 3, 1, 1)
    tasks = ShardTasks(shards, 3, 1, 1, left_out=keys)
    drawn = {c for e in range(200) for c in tasks.episodes(0, "train", [e])[0].info["classes"]}
    assert drawn == {f"k{i}" for i in range(1, 12)}
    whole = load_manifest(shards).content_id
    other = ShardTasks(shards, 3, 1, 1, left_out=[*keys, "c00002-0000"])
    assert len({whole, tasks.describe()["content_id"], other.describe()["content_id"]}) == 3
    assert tasks.describe()["left_out"] == 4
    with pytest.raises(DataError, match="k1"):
        ShardTasks(shards, 3, 1, 4, left_out=keys)


def test_a_run_names_what_it_leaves_out_and_is_resumed_without_looking_again(shards: Path, tmp_path: Path) -> None:
    keys = spoil(shards, 4, 31)
    refused = train(shards, tmp_path / "error")
    assert refused.exit_code == 1 and "altered: its crc32" in refused.output
    few = train(shards, tmp_path / "few", **{"tasks.on_bad": "skip"})
    assert few.exit_code == 1 and "2 of its 60 blocks cannot be read, more than tasks.most_bad=0.01" in few.output
    assert not (tmp_path / "few").exists()
    done = train(shards, tmp_path / "run", **{"tasks.on_bad": "skip", "tasks.most_bad": 0.05})
    assert done.exit_code == 0, done.output
    assert "2 blocks that cannot be read are left out (tasks.on_bad=skip): 1 of k1, 1 of k10" in done.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["left_out"] == {"k1": 1, "k10": 1}
    assert all(key in (tmp_path / "run" / "config.yaml").read_text() for key in keys)
    spoil(shards, 4)  # whole again: it stays out, or the run would draw other episodes than before
    resumed = CliRunner().invoke(main, ["resume", str(tmp_path / "run"), "outer.steps=5"])
    assert resumed.exit_code == 0, resumed.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["left_out"] == {"k1": 1, "k10": 1}
    spoil(shards, 31)
    moved = CliRunner().invoke(main, ["resume", str(tmp_path / "run"), "outer.steps=7", "tasks.left_out=[]"])
    assert moved.exit_code == 1 and "was trained on data" in moved.output


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four classes of ten pictures, two of which are none."""
    root = tmp_path / "pictures"
    for c in range(4):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (10, 10), (c * 60, i * 20, 0)).save(root / f"class{c}" / f"{i}.png")
    (root / "class1" / "3.png").write_bytes(b"no picture")
    whole = (root / "class2" / "5.png").read_bytes()
    (root / "class2" / "5.png").write_bytes(whole[: len(whole) // 2])
    return root


def test_pictures_that_are_none_are_left_out_if_asked(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"class1/3\.png"):
        pack_folder(pictures, tmp_path / "error", size=8)
    with pytest.raises(DataError, match=r"(?s)more than 0 of 40 images cannot be read:.*class1/3\.png.*raise most_bad"):
        pack_folder(pictures, tmp_path / "few", size=8, on_bad="skip")
    assert not (tmp_path / "error").exists() and not (tmp_path / "few").exists()
    command = ["data", "pack", "folder", "--source", str(pictures), "--out", str(tmp_path / "set"), "--size", "8"]
    done = CliRunner().invoke(main, [*command, "--on-bad", "skip", "--most-bad", "0.05"])
    assert done.exit_code == 0 and "left out 1 of class class1, which cannot be read" in done.output, done.output
    manifest = load_manifest(tmp_path / "set")
    assert manifest.notes["left_out"] == {"class1": 1, "class2": 1} and manifest.examples == 38
