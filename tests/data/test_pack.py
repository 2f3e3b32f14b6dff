"""Packing: what goes in comes out, whole or not at all, and every fault is named."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_sets import SPLITS, draw_omniglot, images

from metadist.data import ShardSet, info, pack_arrays, pack_omniglot, verify
from metadist.errors import DataError


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_omniglot(tmp_path_factory.mktemp("omniglot"))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return draw_omniglot(tmp_path / "source", characters=2, zipped=False)


def lists(directory: Path, **parts: list[str]) -> Path:
    """Class lists in the way of Vinyals et al., every rotation of each character."""
    directory.mkdir(exist_ok=True)
    for name in ("train", "val", "test"):
        lines = [f"{c}/rot{r:03d}\n" for c in parts.get(name, []) for r in (0, 90, 180, 270)]
        (directory / f"vinyals_{name}.txt").write_text("".join(lines))
    return directory


def nothing_left(out: Path) -> bool:
    return not out.exists() and not list(out.parent.glob(f".{out.name}.*"))


def test_omniglot_from_zips_and_from_folders_is_one_set(omniglot: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    a = pack_omniglot(omniglot, tmp_path / "a", split="random", progress=lambda d, n: seen.append((d, n)))
    draw_omniglot(tmp_path / "unpacked", zipped=False)
    b = pack_omniglot(tmp_path / "unpacked", tmp_path / "b", split="random")
    assert a.content_id == b.content_id and seen[-1] == (8, 8)
    assert (tmp_path / "a" / "shard-00000.tar").read_bytes() == (tmp_path / "b" / "shard-00000.tar").read_bytes()
    assert verify(tmp_path / "a").examples == 160
    assert a.licence.startswith("MIT") and a.field.shape == (28, 28)
    assert ShardSet(tmp_path / "a").block(0).shape == (20, 28, 28)


def test_ink_is_bright_and_paper_dark(tmp_path: Path, folders: Path) -> None:
    page = np.ones((105, 105), dtype=bool)
    page[:, :30] = False  # ink is 0 in Omniglot's files
    first = sorted(folders.rglob("*.png"))[0]
    Image.fromarray(page).save(first)
    pack_omniglot(folders, tmp_path / "out", split="random")
    drawn = ShardSet(tmp_path / "out").block(0)[0]
    assert (drawn[:, :6] > 250).all() and (drawn[:, 12:] == 0).all()
    assert ((drawn[:, 6:10] > 0) & (drawn[:, 6:10] < 255)).any()  # the edge is smoothed


def test_vinyals_lists_make_the_splits(omniglot: Path, tmp_path: Path) -> None:
    parts = {"train": ["Alpha0/character00", "Alpha1/character05"], "val": ["Alpha0/character02"]}
    m = pack_omniglot(
        omniglot, tmp_path / "out", splits_dir=lists(tmp_path / "l", test=["Alpha1/character01"], **parts)
    )
    named = {s: [m.classes[c] for c in members] for s, members in m.splits.items()}
    assert named == {"train": parts["train"], "validation": parts["val"], "test": ["Alpha1/character01"]}


def test_random_split_depends_on_its_seed_and_covers_all(omniglot: Path, tmp_path: Path) -> None:
    splits = [pack_omniglot(omniglot, tmp_path / f"{i}", split="random", seed=i // 2, size=4).splits for i in range(4)]
    assert splits[0] == splits[1] and splits[0] != splits[2]
    assert sorted(c for members in splits[0].values() for c in members) == list(range(8))


def first_image(root: Path) -> Path:
    return sorted(root.rglob("*.png"))[0]


def spoil_png(root: Path) -> None:
    file = first_image(root)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: first_image(r).unlink(), "character00 has 19 drawings of 20; download the images again"),
        (lambda r: shutil.copy(first_image(r), first_image(r).with_name("0009_01.png")), "drawer 01 is there twice"),
        (spoil_png, "0000_01.png: cannot be read as an image ("),
        (lambda r: first_image(r).write_bytes(first_image(r).read_bytes()[:60]), "0000_01.png: cannot be read as an"),
        (lambda r: first_image(r).write_bytes(b""), "0000_01.png: cannot be read as an image (unknown format)"),
        (lambda r: first_image(r).rename(first_image(r).with_name("x.png")), "x.png: is not <part>/<Alphabet>/char"),
        (lambda r: Image.new("1", (9, 8)).save(first_image(r)), "0000_01.png: image of 9 x 8 is not square"),
        (lambda r: shutil.rmtree(r / "images_evaluation"), "holds neither images_evaluation.zip nor the folder"),
        (lambda r: (r / "images_evaluation.zip").write_bytes(b"no"), "images_evaluation.zip: cannot be read as a zip"),
    ],
)
def test_a_fault_of_omniglot_is_named(
    folders: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(folders)
    with pytest.raises(DataError) as error:
        pack_omniglot(folders, tmp_path / "out", split="random")
    assert message in str(error.value)
    assert nothing_left(tmp_path / "out")


def test_a_cut_image_within_a_zip_is_named(omniglot: Path, tmp_path: Path) -> None:
    shutil.copytree(omniglot, tmp_path / "source")
    path = tmp_path / "source" / "images_background.zip"
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF  # within the first file's bytes
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"images_background.zip:.*0000_01.png: cannot be read"):
        pack_omniglot(tmp_path / "source", tmp_path / "out", split="random")


def test_a_name_twice_in_a_zip_is_named(omniglot: Path, tmp_path: Path) -> None:
    shutil.copytree(omniglot, tmp_path / "source")
    with zipfile.ZipFile(tmp_path / "source" / "images_background.zip", "a") as archive:
        name = archive.namelist()[0]
        with pytest.warns(UserWarning):
            archive.writestr(name, b"again")
    with pytest.raises(DataError, match=f"{name}: is in the zip twice"):
        pack_omniglot(tmp_path / "source", tmp_path / "out", split="random")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Alpha0/character00\n", "vinyals_train.txt:1: 'Alpha0/character00' is not Alphabet/characterNN/rotDDD"),
        ("Alpha9/character00/rot000\n", "vinyals_train.txt:1: character 'Alpha9/character00' is not among the images"),
        ("Alpha0/character00/rot090\n", "vinyals_train.txt: Alpha0/character00 is listed in 1 of its 4 rotations"),
    ],
)
def test_a_fault_of_a_class_list_is_named(omniglot: Path, tmp_path: Path, text: str, message: str) -> None:
    directory = lists(tmp_path / "l")
    (directory / "vinyals_train.txt").write_text(text)
    with pytest.raises(DataError) as error:
        pack_omniglot(omniglot, tmp_path / "out", splits_dir=directory)
    assert message in str(error.value)


def test_lists_that_overlap_or_lack_are_refused(omniglot: Path, tmp_path: Path) -> None:
    both = lists(tmp_path / "l", train=["Alpha0/character00"], test=["Alpha0/character00"])
    with pytest.raises(DataError, match="class 'Alpha0/character00' is in splits 'test' and 'train'"):
        pack_omniglot(omniglot, tmp_path / "out", splits_dir=both)
    assert nothing_left(tmp_path / "out")
    with pytest.raises(DataError, match="vinyals_train.txt: no such class list; give --splits-dir"):
        pack_omniglot(omniglot, tmp_path / "out", splits_dir=tmp_path)
    with pytest.raises(DataError, match="split: 'other' is not a split of Omniglot"):
        pack_omniglot(omniglot, tmp_path / "out", split="other")


def test_without_a_network_the_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(DataError, match=r"images_background.zip: cannot be downloaded \(Name or.*; check the network"):
        pack_omniglot(None, tmp_path / "out", split="random")
    assert nothing_left(tmp_path / "out")


def test_without_source_both_zips_are_downloaded(
    omniglot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answer(io.BytesIO):
        headers: dict[str, str] = {}

    def serve(url: str, timeout: float) -> Answer:
        return Answer((omniglot / url.rsplit("/", 1)[1]).read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    m = pack_omniglot(None, tmp_path / "out", split="random", size=4)
    assert m.examples == 160


def test_real_omniglot_has_the_vinyals_counts(omniglot_shards: Path) -> None:
    m = ShardSet(omniglot_shards).manifest
    assert {s: len(c) for s, c in m.splits.items()} == {"train": 1028, "validation": 172, "test": 423}
    assert (len(m.classes), m.examples, m.blocks) == (1623, 32460, 1623)
    assert sum(map(len, m.splits.values())) == len({c for members in m.splits.values() for c in members})
    assert verify(omniglot_shards).content_id == m.content_id
    braille = m.classes.index("Braille/character10")
    block = ShardSet(omniglot_shards).block(braille)
    assert block.mean() < 60  # mostly paper


def test_a_large_class_is_cut_into_even_blocks(tmp_path: Path) -> None:
    pack_arrays([images()[0], images(1, 11)[0]], ["a", "b"], {}, tmp_path / "out", block_examples=5)
    assert ShardSet(tmp_path / "out").index["n"].tolist() == [3, 3, 3, 4, 4]


@pytest.mark.parametrize("kind", [Path.mkdir, Path.touch])
def test_what_is_there_already_is_left_alone(tmp_path: Path, kind: Callable[[Path], None]) -> None:
    kind(tmp_path / "out")
    with pytest.raises(DataError, match="out: exists already; remove it or choose another directory"):
        pack_arrays(images(), [f"k{i}" for i in range(12)], SPLITS, tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("names", "splits", "message"),
    [
        (["a"], {}, "names: 1 names for 12 classes"),
        ([f"k{i}" for i in range(12)], {"train": ["nobody"]}, "splits.train: no class is named 'nobody'"),
        ([f"k{i}" for i in range(12)], {"train": [0], "test": ["k0"]}, "class 'k0' is in splits 'test' and 'train'"),
        (["same"] * 12, {}, "two classes have one name"),
    ],
)
def test_arrays_that_make_no_set_are_refused(
    tmp_path: Path, names: list[str], splits: dict[str, list[int | str]], message: str
) -> None:
    with pytest.raises(DataError) as error:
        pack_arrays(images(), names, splits, tmp_path / "out")
    assert message in str(error.value) and nothing_left(tmp_path / "out")


def test_arrays_of_another_shape_or_type_or_none_are_refused(tmp_path: Path) -> None:
    for second, message in (
        (images(1, 6, 5)[0], "b: examples are uint8"),
        (images(1)[0] / 2, "b: examples are float64"),
        (images(1)[0][:0], "b: a class without examples; leave it out"),
    ):
        with pytest.raises(DataError, match=message):
            pack_arrays([images()[0], second], ["a", "b"], {}, tmp_path / "out")  # type: ignore[list-item]
        assert nothing_left(tmp_path / "out")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\); free some space"):
        pack_arrays(images(), [f"k{i}" for i in range(12)], SPLITS, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="out: cannot be written \\(File exists\\); choose another directory"):
        pack_arrays(images(), [f"k{i}" for i in range(12)], SPLITS, tmp_path / "file" / "out")


KILLED = """
import os, signal, sys
import numpy as np
from metadist.data import pack_arrays
def stop(done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
pack_arrays(np.zeros((4, 2, 3, 3), np.uint8), list("abcd"), {}, sys.argv[1], progress=stop)
"""


def test_a_set_made_by_another_meanwhile_is_left_alone(tmp_path: Path) -> None:
    def other(done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").touch()

    with pytest.raises(DataError, match="exists already"):
        pack_arrays(images(), [f"k{i}" for i in range(12)], SPLITS, tmp_path / "out", progress=other)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "theirs"]


def test_a_killed_pack_leaves_no_set_and_the_next_one_succeeds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    pack_arrays(images(), [f"k{i}" for i in range(12)], SPLITS, out)
    assert info(out)["classes"] == 12
