"""Pictures whose classes stand in a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from metadist.cli import main
from metadist.data import LabelTable, ShardSet, load_manifest, pack_folder
from metadist.errors import DataError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve pictures of one colour each, in two folders that say nothing."""
    for i in range(12):
        folder = tmp_path / "photos" / f"part{i // 6}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 10 * i).save(folder / f"p{i:02d}.png")
    return tmp_path / "photos"


def table(path: Path, *rows: str, header: str = "filename,label") -> Path:
    path.write_text("\n".join([header, *rows]))
    return path


def colours(path: Path) -> dict[str, list[int]]:
    shards = ShardSet(path)
    m = shards.manifest
    return {m.classes[int(shards.index["class"][b])]: shards.block(b)[:, 0, 0].tolist() for b in range(len(m.classes))}


def pack(source: Path, out: Path, *more: object) -> Result:
    words = ["data", "pack", "folder", "--source", source, "--out", out, "--as-is", "--gray", *more]
    return CliRunner().invoke(main, list(map(str, words)))


@pytest.mark.parametrize("name", ["part{}/p{:02d}.png", "./part{}/p{:02d}.png", "p{1:02d}.png", "p{1:02d}",
                                  "C:\\photos\\p{1:02d}.png", "elsewhere/p{1:02d}.png"])  # fmt: skip
def test_a_table_tells_classes_by_path_name_or_stem(photos: Path, tmp_path: Path, name: str) -> None:
    rows = [f"{name.format(i // 6, i)},{'abc'[i % 3]}" for i in reversed(range(9))]
    told = pack(photos, tmp_path / "out", "--labels", table(tmp_path / "t.csv", *rows))
    assert told.exit_code == 0, told.output
    assert colours(tmp_path / "out") == {"a": [60, 30, 0], "b": [70, 40, 10], "c": [80, 50, 20]}


def test_a_column_or_the_names_of_tables_tell_the_splits(photos: Path, tmp_path: Path) -> None:
    parts = {"train": "ab", "val": "c", "test": "d"}
    label = {i: "abcd"[i % 4] for i in range(12)}
    tables = [
        table(tmp_path / f"{s}.csv", *(f"p{i:02d}.png,{c}" for i, c in label.items() if c in classes))
        for s, classes in parts.items()
    ]
    words = [w for t in tables for w in ("--labels", t)]
    assert pack(photos, tmp_path / "out", *words).exit_code == 0
    of = {c: s for s, classes in parts.items() for c in classes}
    rows = [f"p{i:02d},{c},{of[c]}" for i, c in label.items()]
    one = table(tmp_path / "t.csv", *rows, header="id,kind,part")
    by_column = pack(photos, tmp_path / "column", "--labels", one, "--file-column", "id", "--label-column", "kind",
                     "--split-column", "part")  # fmt: skip
    assert by_column.exit_code == 0, by_column.output
    m, other = load_manifest(tmp_path / "out"), load_manifest(tmp_path / "column")
    named = {s: [m.classes[c] for c in members] for s, members in m.splits.items()}
    assert named == {"train": ["a", "b"], "validation": ["c"], "test": ["d"]} and m.content_id == other.content_id


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("p12.png,a", "there is no picture 'p12.png'; did you mean 'p1"),
        ("zzz,a", "there is no picture 'zzz'; name it by its path within the source"),
        ("p03.png,b", "picture 'p03.png' was named at"),
        ("p09.png,", "column 'label' is empty; fill it in"),
        ("same.png,a", "'same.png' could be 'part0/same.png', 'part1/same.png'; name it by its path"),
        ("p09.png,a,b", "3 values, but the header names 2 columns"),
    ],
)
def test_a_bad_row_is_told_or_left_out(photos: Path, tmp_path: Path, row: str, message: str) -> None:
    for part in (0, 1):
        Image.new("L", (4, 4)).save(photos / f"part{part}" / "same.png")
    rows = [f"p{i:02d}.png,{'ab'[i % 2]}" for i in range(8)]
    labels = table(tmp_path / "t.csv", *rows, row)
    told = pack(photos, tmp_path / "out", "--labels", labels)
    assert told.exit_code == 1 and f"t.csv:10: {message}" in told.output and not (tmp_path / "out").exists()
    told = pack(photos, tmp_path / "out", "--labels", labels, "--on-bad", "skip", "--most-bad", "0.2")
    assert told.exit_code == 0 and "left out 1 row of" in told.output, told.output
    assert colours(tmp_path / "out") == {"a": [0, 20, 40, 60], "b": [10, 30, 50, 70]}


def test_pictures_that_lie_directly_in_a_folder(photos: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in photos.rglob("*.png"):
        file.rename(flat / file.name)
    with pytest.raises(DataError, match=r"its 12 pictures lie in it directly; .* or give a table of their .*--labels"):
        pack_folder(flat, tmp_path / "out")
    labels = LabelTable([table(tmp_path / "t.csv", *(f"p{i:02d},k{i % 2}" for i in range(12)))])
    m = pack_folder(flat, tmp_path / "out", size=None, grayscale=True, labels=labels)
    assert m.classes == ("k0", "k1") and m.examples == 12


def test_real_ham10000(metadist_data: Path, tmp_path: Path) -> None:
    source = metadist_data / "ham10000-sample"
    words = ["--labels", source / "HAM10000_metadata_sample.csv", "--file-column", "image_id", "--label-column", "dx"]
    command = ["data", "pack", "folder", "--source", source / "ham10000_sample.zip", "--size", 28, *words]
    told = CliRunner().invoke(main, list(map(str, [*command, "--out", tmp_path / "out"])))
    assert told.exit_code == 0, told.output
    by_folder = pack_folder(source / "ham10000_sample.zip", tmp_path / "folder", size=28)
    m = load_manifest(tmp_path / "out")
    assert m.classes == by_folder.classes and m.examples == by_folder.examples == 70
    one, other = ShardSet(tmp_path / "out").block(3), ShardSet(tmp_path / "folder").block(3)
    assert np.array_equal(np.sort(one.reshape(10, -1), axis=0), np.sort(other.reshape(10, -1), axis=0))
