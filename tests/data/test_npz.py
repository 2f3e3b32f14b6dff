"""Arrays in one .npz file: what goes in comes out as bytes, by class, and what does not fit is told."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from shard_sets import images

from metadist.cli import main
from metadist.data import ShardSet, load_manifest, pack_npz, verify

X = images(6, 4).reshape(24, 4, 4)
Y = np.repeat(np.arange(6), 4)
MIXED = np.random.default_rng(0).permutation(24)


def pack(tmp_path: Path, *more: object, **arrays: Any) -> Result:
    np.savez(tmp_path / "a.npz", **arrays)
    words = ["data", "pack", "arrays", "--source", tmp_path / "a.npz", "--out", tmp_path / "out", *more]
    return CliRunner().invoke(main, list(map(str, words)))


def pictures(path: Path) -> dict[str, np.ndarray]:
    shards = ShardSet(path)
    return {shards.manifest.classes[int(shards.index["class"][b])]: shards.block(b) for b in range(len(shards.index))}


def members(path: Path) -> dict[str, list[str]]:
    m = load_manifest(path)
    return {s: [m.classes[c] for c in numbers] for s, numbers in m.splits.items()}


def test_pictures_come_out_by_class_in_the_order_of_the_rows(tmp_path: Path) -> None:
    told = pack(tmp_path, x=X[MIXED], y=Y[MIXED] * 5)
    assert told.exit_code == 0 and "converted" not in told.output, told.output
    found = pictures(tmp_path / "out")
    assert list(found) == ["0", "5", "10", "15", "20", "25"]
    for c in range(6):
        assert np.array_equal(found[str(5 * c)], X[MIXED][Y[MIXED] == c])
    assert verify(tmp_path / "out").examples == 24


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_floats_of_0_to_1_become_bytes_and_are_told(tmp_path: Path, kind: type) -> None:
    told = pack(tmp_path, x=(X / 255).astype(kind), y=Y)
    assert told.exit_code == 0 and f"converted {np.dtype(kind)} of 0 to 1 to uint8" in told.output, told.output
    assert np.array_equal(pictures(tmp_path / "out")["3"], X[12:16])


def test_booleans_are_ink(tmp_path: Path) -> None:
    assert pack(tmp_path, x=X > 127, y=Y).exit_code == 0
    assert np.array_equal(pictures(tmp_path / "out")["0"], np.where(X[:4] > 127, 255, 0))


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_channels_come_last(tmp_path: Path, channels: int) -> None:
    x = np.stack([X] * channels, axis=-1)
    x[..., -1] = 255 - X
    assert pack(tmp_path, x=x, y=Y).exit_code == 0
    assert np.array_equal(pictures(tmp_path / "out")["1"], x[4:8, ..., 0] if channels == 1 else x[4:8])
    assert verify(tmp_path / "out").examples == 24


def test_labels_are_texts_or_numbers_of_names(tmp_path: Path) -> None:
    names = np.array(["🦊", "b", "a", "d", "e", "f/g"])
    assert pack(tmp_path, x=X, y=names[Y]).exit_code == 0
    one = pictures(tmp_path / "out")
    np.savez(tmp_path / "named.npz", x=X, y=Y, names=names)
    m = pack_npz(tmp_path / "named.npz", tmp_path / "named")
    assert list(one) == ["a", "b", "d", "e", "f/g", "🦊"] == list(m.classes)
    assert np.array_equal(one["🦊"], X[:4]) and np.array_equal(pictures(tmp_path / "named")["🦊"], X[:4])


def test_splits_by_array_list_or_chance(tmp_path: Path) -> None:
    split = np.array(["train", "val", "train", "test", "train", "train"])[Y]
    assert pack(tmp_path, x=X, y=Y, split=split).exit_code == 0
    assert members(tmp_path / "out") == {"test": ["3"], "train": ["0", "2", "4", "5"], "validation": ["1"]}
    (tmp_path / "s.json").write_text('{"train": ["5", "0"], "test": ["2"]}')
    listed = pack_npz(tmp_path / "a.npz", tmp_path / "listed", splits=tmp_path / "s.json")
    assert members(tmp_path / "listed") == {"train": ["0", "5"], "test": ["2"]} and listed.notes["in_no_split"] == 3
    np.savez(tmp_path / "b.npz", x=X, y=Y)
    dealt = pack_npz(tmp_path / "b.npz", tmp_path / "dealt")
    assert {s: len(c) for s, c in dealt.splits.items()} == {"train": 4, "validation": 1, "test": 1}


def test_small_classes_are_left_out_if_asked(tmp_path: Path) -> None:
    refused = pack(tmp_path, x=X[:21], y=Y[:21])
    assert refused.exit_code == 1 and "1 of 6 classes have fewer than 2 examples: '5' (1); an episode" in refused.output
    told = pack(tmp_path, "--on-bad", "skip", x=X[:21], y=Y[:21])
    assert told.exit_code == 0 and "left out 1 class with too few examples: '5' (1)" in told.output


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "a.npz: has no array 'y'; it has 'x'; save it with np.savez(FILE, x=pictures, y=labels)"),
        ({"x": X, "y": Y[:-1]}, "a.npz: y: 23 labels for 24 pictures in x; give one for each"),
        ({"x": X, "y": Y.astype(object)}, "a.npz: y: holds Python objects, which could run code when they are read; "
         "save it as plain numbers or texts, y=np.array(y.tolist())"),
        ({"x": X, "y": Y / 2}, "a.npz: y: is float64 [24]; give one whole number or text for each picture"),
        ({"x": X, "y": np.eye(6, dtype=int)[Y]}, "a.npz: y: is int64 [24, 6]; give one whole number or text for each "
         "picture, y.argmax(1) of one-hot rows"),
        ({"x": X[:, 0], "y": Y}, "a.npz: x: is uint8 [24, 4]; it must be pictures [N, H, W] or [N, H, W, C]"),
        ({"x": X[:0], "y": Y[:0]}, "a.npz: x: is uint8 [0, 4, 4]; it must be"),
        ({"x": X.astype(int), "y": Y}, "a.npz: x: holds int64; make it uint8 of 0 to 255, or float of 0 to 1"),
        ({"x": X / 1.0, "y": Y}, "to 2"),
        ({"x": np.where(np.arange(24)[:, None, None] == 7, np.nan, X / 255), "y": Y}, "a.npz: x[7]: holds NaN or inf"),
        ({"x": np.stack([X] * 3, axis=1), "y": Y}, "a.npz: x: is [24, 3, 4, 4], 4 channels if they are last; put the "
         "channels last, x.transpose(0, 2, 3, 1)"),
        ({"x": X, "y": Y, "names": np.array(["a", "b"])}, "a.npz: y: holds 0 to 5, but there are 2 names"),
        ({"x": X, "y": Y, "split": np.array(["train", "test"] * 12)}, "a.npz: split[1]: class '0' is in split 'test', "
         "but in 'train' at"),
        ({"x": X, "y": Y, "split": np.array(["train"])}, "a.npz: split: is <U5 [1]; give a text for each of 24"),
        ({"x": X, "y": Y * 0}, "a.npz: holds one class alone, '0'; an episode tells classes apart"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_told(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    told = pack(tmp_path, **arrays)
    assert told.exit_code == 1 and message in told.output, told.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz"]


def test_a_file_that_is_none_or_cut(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    whole = (tmp_path / "a.npz").read_bytes()
    words = ["data", "pack", "arrays", "--source", str(tmp_path / "b.npz"), "--out", str(tmp_path / "out")]
    assert "b.npz: cannot be read (No such file or directory); give an .npz" in CliRunner().invoke(main, words).output
    for spoilt in (whole[:200], b"text", b""):
        (tmp_path / "b.npz").write_bytes(spoilt)
        assert "b.npz: is not an .npz file, or is cut" in CliRunner().invoke(main, words).output
    newer = bytearray(whole)
    newer[newer.rindex(b"PK\1\2") + 6] = 200  # the version that is needed to read it
    for name in ("b.npz", "b.zip"):
        (tmp_path / name).write_bytes(newer)
    assert "is not an .npz file, or is cut (zip file version 20.0)" in CliRunner().invoke(main, words).output
    folder = ["data", "pack", "folder", "--source", str(tmp_path / "b.zip"), "--out", str(tmp_path / "out")]
    assert "b.zip: cannot be read as a zip (zip file version 20.0)" in CliRunner().invoke(main, folder).output
    altered = bytearray(whole)
    altered[300] ^= 1
    (tmp_path / "b.npz").write_bytes(altered)
    assert "b.npz: x: is cut or damaged (Bad CRC-32" in CliRunner().invoke(main, words).output
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", b"no array")
        archive.writestr("y.npy", b"")
    assert "b.npz: x: is not a plain array" in CliRunner().invoke(main, words).output
