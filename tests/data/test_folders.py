"""Folders of pictures, one a class: whatever form they come in, and every fault by name."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageOps
from shard_sets import bomb, draw_folder

from metadist.cli import main
from metadist.data import ShardSet, pack_folder, verify
from metadist.errors import DataError


def nothing_left(out: Path) -> bool:
    return not out.exists() and not list(out.parent.glob(f".{out.name}.*"))


def rename(root: Path, first: str, second: str) -> None:
    """Class a becomes ``first``, class b ``second``."""
    for old, new in (("a", first), ("b", second)):
        (root / new).parent.mkdir(exist_ok=True)
        (root / old).rename(root / new)


@pytest.mark.parametrize("encoding", ["array", "png", "jpeg"])
def test_a_folder_of_colour_images(tmp_path: Path, encoding: str) -> None:
    draw_folder(tmp_path / "in", [f"c{i}" for i in range(10)])
    m = pack_folder(tmp_path / "in", tmp_path / "out", size=8, encoding=encoding)
    assert {s: len(c) for s, c in m.splits.items()} == {"train": 6, "validation": 2, "test": 2}
    shards = ShardSet(tmp_path / "out")
    assert shards.block(2).shape == (3, 8, 8, 3)
    assert np.abs(shards.block(2)[1].astype(int) - [40, 10, 7]).max() <= (3 if encoding == "jpeg" else 0)
    assert verify(tmp_path / "out").examples == 30


def test_folders_named_after_splits_are_splits(tmp_path: Path) -> None:
    draw_folder(tmp_path / "in", ["train/a", "train/b", "val/c", "test/d/e"], colour=False)
    (tmp_path / "in" / "train" / ".hidden.png").write_bytes(b"")
    (tmp_path / "in" / "train" / "a" / "notes.txt").write_text("not an image")
    m = pack_folder(tmp_path / "in", tmp_path / "out", size=6, grayscale=True)
    named = {s: [m.classes[c] for c in members] for s, members in m.splits.items()}
    assert named == {"train": ["a", "b"], "validation": ["c"], "test": ["d/e"]}
    assert m.field.shape == (6, 6)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda r: (r / "a" / "0.png").write_bytes(b"PSD"), {}, "cannot be read as an image (unknown format)"),
        (lambda r: bomb(r / "a" / "0.png"), {}, "0.png: cannot be read as an image (Image size"),
        (lambda r: shutil.rmtree(r / "a"), {}, "holds one class alone, 'b'; an episode tells classes apart: give two"),
        (lambda r: (r / "a" / "0.png").rename(r / "b" / "4.png") and (r / "a" / "1.png").unlink(), {},
         "1 of 2 classes have fewer than 2 examples: 'a' (1); an episode needs support and query"),
        (lambda r: rename(r, "train/x", "more/y"), {}, "'train' are splits by their names, but 'more' beside them "
         "cannot be; move them away, or name the classes of each split with --splits"),
        (lambda r: shutil.rmtree(r), {}, "in: no such directory"),
        (lambda r: None, {"size": 0}, "size, encoding: 0 and 'array'"),
        (lambda r: None, {"fractions": {"train": 0.5}}, "do not sum to 1"),
        (lambda r: rename(r, "test/x", "train/x"), {}, "class 'x' is in splits 'test' and 'train'; keep it in one"),
    ],
)  # fmt: skip
def test_a_fault_of_a_folder_is_named(
    tmp_path: Path, spoil: Callable[[Path], object], options: dict[str, object], message: str
) -> None:
    root = draw_folder(tmp_path / "in", ["a", "b"])
    spoil(root)
    with pytest.raises(DataError) as error:
        pack_folder(root, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert message in str(error.value)
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".gif", ".tif", ".TIFF", ".jpeg"])
def test_pictures_of_other_formats(tmp_path: Path, suffix: str) -> None:
    for c in range(2):
        (tmp_path / "in" / f"c{c}").mkdir(parents=True)
        for i in range(2):
            frames = [Image.new("RGB", (8, 8), (100 * c, 60 * i, k)) for k in (30, 90)]
            more = {"save_all": True, "append_images": frames[1:]} if suffix in (".gif", ".tif") else {}
            more |= {"lossless": True} if suffix == ".webp" else {}
            frames[0].save(tmp_path / "in" / f"c{c}" / f"{i}{suffix}", **more)
    pack_folder(tmp_path / "in", tmp_path / "out", size=8)
    shards = ShardSet(tmp_path / "out")
    found = np.stack([shards.block(c)[:, 4, 4] for c in range(2)]).astype(int)
    wanted = np.array([[[100 * c, 60 * i, 30] for i in range(2)] for c in range(2)])
    assert np.abs(found - wanted).max() <= (4 if suffix == ".jpeg" else 0), "of several frames the first is taken"


def test_pictures_as_they_are(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "in", ["a", "b", "c"])
    m = pack_folder(root, tmp_path / "out", size=None)
    assert m.field.shape == (9, 12, 3)
    assert np.array_equal(ShardSet(tmp_path / "out").block(1)[2], np.asarray(Image.open(root / "b" / "2.png")))
    Image.new("RGB", (9, 12)).save(root / "b" / "2.png")
    with pytest.raises(DataError, match=r"b/2\.png: is 9 x 12, but .*a/0\.png is 12 x 9; .*leave out --as-is"):
        pack_folder(root, tmp_path / "other", size=None)
    left = pack_folder(root, tmp_path / "other", size=None, on_bad="skip", most_bad=0.2)
    assert left.notes["left_out"] == {"b": 1} and left.examples == 8


def test_a_list_tells_the_splits_of_folders(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "in", ["a", "b", "c", "d/e"])
    (tmp_path / "s.json").write_text('{"train": ["d/e", "a"], "val": ["c"]}')
    m = pack_folder(root, tmp_path / "out", splits=tmp_path / "s.json", size=4)
    named = {s: [m.classes[c] for c in members] for s, members in m.splits.items()}
    assert named == {"train": ["a", "d/e"], "validation": ["c"]} and m.notes == {"in_no_split": 1}
    assert ShardSet(tmp_path / "out").block(2)[0, 0, 0].tolist() == [60, 0, 7], "d/e is the class of its own pictures"
    (tmp_path / "s.json").write_text('{"train": ["a", "b"], "test": ["d"]}')
    with pytest.raises(DataError, match=r"s\.json: test: no class is named 'd'; "):
        pack_folder(root, tmp_path / "wrong", splits=tmp_path / "s.json")


@pytest.mark.parametrize("inner", ["", "pictures/"])
def test_a_zip_of_folders_is_the_same_set(tmp_path: Path, inner: str) -> None:
    root = draw_folder(tmp_path / "in", ["train/a", "train/b", "test/c"])
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for file in root.rglob("*.png"):
            archive.write(file, inner + str(file.relative_to(root)))
        archive.writestr(f"__MACOSX/{inner}a/._0.png", b"")
    packed = [pack_folder(tmp_path / name, tmp_path / f"out-{name}", size=5) for name in ("in", "in.zip")]
    assert packed[0].content_id == packed[1].content_id and packed[1].name == "in"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_a_photograph_is_turned_as_the_camera_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    root = draw_folder(tmp_path / "in", ["a", "b"])
    corners = np.kron([[250, 170], [90, 10]], np.ones((8, 8))).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(corners).convert("RGB").save(root / "a" / f"last{suffix}", exif=exif, quality=95)
    pack_folder(root, tmp_path / "out", size=16)
    drawn = ShardSet(tmp_path / "out").block(0)[-1, :, :, 0].astype(int)
    wanted = ImageOps.exif_transpose(Image.open(root / "a" / f"last{suffix}"))
    assert np.abs(drawn[2::12, 2::12] - np.asarray(wanted.convert("L"), dtype=int)[2::12, 2::12]).max() <= 12


@pytest.mark.parametrize("spoil", [lambda e: e[:9], lambda e: b"Exif\0\0no" + e[8:], lambda e: e[:-9]])
def test_a_damaged_exif_turns_nothing(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    root = draw_folder(tmp_path / "in", ["a", "b"])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (12, 9)).save(root / "a" / "0.png", exif=spoil(exif.tobytes()))
    assert pack_folder(root, tmp_path / "out", size=None).field.shape == (9, 12, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_become_eight_without_being_cut(tmp_path: Path, suffix: str) -> None:
    root = draw_folder(tmp_path / "in", ["a", "b"])
    Image.fromarray(np.full((9, 12), 40000, dtype=np.uint16)).save(root / "a" / f"0{suffix}")
    pack_folder(root, tmp_path / "out", size=4, grayscale=True)
    assert (ShardSet(tmp_path / "out").block(0) == 40000 >> 8).any()
    Image.fromarray(np.full((9, 12), 0.5, dtype=np.float32)).save(root / "b" / "0.tif")
    with pytest.raises(DataError, match=r"b/0\.tif: has 32 bits a pixel; save it with 8 or 16"):
        pack_folder(root, tmp_path / "float", size=4)


def test_linked_folders_are_classes_too(tmp_path: Path) -> None:
    elsewhere = draw_folder(tmp_path / "elsewhere", ["a", "b"])
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"my-{name}").symlink_to(elsewhere / name)
    assert pack_folder(tmp_path / "in", tmp_path / "out").classes == ("my-a", "my-b")


def test_an_image_that_cannot_be_read_is_not_called_unwritable(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "in", ["a", "b"])
    (root / "a" / "9.png").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"9.png: cannot be read \(No such file or directory\)"):
        pack_folder(root, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_splits_too_small_for_an_episode_are_told(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "in", ["train/a", "train/b", "val/c"])
    words = ["data", "pack", "folder", "--source", str(root), "--out", str(tmp_path / "out"), "--as-is"]
    told = CliRunner().invoke(main, words)
    assert told.exit_code == 0 and "no episode can be made of validation alone, which has 1 class\n" in told.output
    assert "of train alone" not in told.output


def test_as_is_and_a_size_are_bad_usage(tmp_path: Path) -> None:
    told = CliRunner().invoke(main, ["data", "pack", "folder", "--source", "x", "--out", "y", "--as-is", "--size", "8"])
    assert told.exit_code == 2 and "--as-is and --size contradict each other" in told.output


def test_a_class_that_is_too_small_for_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "in", ["a", "b"], count=10)
    for file in sorted((root / "b").glob("*.png"))[1:]:
        file.write_bytes(b"none")
    with pytest.raises(DataError, match="in: only 1 of the 10 pictures of class 'b' can be read; remove its folder"):
        pack_folder(root, tmp_path / "out", on_bad="skip", most_bad=0.5)
    assert nothing_left(tmp_path / "out")
