"""Packing Omniglot (Lake, Salakhutdinov and Tenenbaum, Science 350, 2015) as a shard set.

Each of the 1,623 characters is kept once, upright, with ink 255 on paper 0; its quarter turns, which few-shot
learning counts as classes of their own (Santoro et al. 2016), are made when an episode is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metadist.data import decode
from metadist.data.manifest import Field, Manifest
from metadist.data.pack import pack_classes
from metadist.data.sources import Progress, SourceFile, downloaded, folder_files, zip_files
from metadist.data.splits import StrPath, deal
from metadist.data.writer import SHARD_BYTES, refuse_existing
from metadist.errors import DataError

PARTS = ("images_background", "images_evaluation")
HOME = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
SPLITS_HOME = "https://raw.githubusercontent.com/jakesnell/prototypical-networks/master/data/omniglot/splits/vinyals"
DRAWERS = 20
LICENCE = "MIT, (c) 2015 Brenden Lake"
# The proportions of the Vinyals split: 1,028, 172 and 423 of 1,623 characters.
FRACTIONS = {"train": 1028 / 1623, "validation": 172 / 1623, "test": 423 / 1623}
_LISTS = {"train": "train", "validation": "val", "test": "test"}
_IMAGE = re.compile(r"\d{4}_(\d{2})\.png")
_LINE = re.compile(r"([^/]+/character\d\d)/rot(000|090|180|270)")


def pack_omniglot(
    source: StrPath | None,
    out: StrPath,
    *,
    split: str = "vinyals",
    splits_dir: StrPath | None = None,
    seed: int = 0,
    size: int = 28,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Manifest:
    """Packs Omniglot from its two zips or folders.

    Args:
        source: directory of ``images_background`` and ``images_evaluation``, as zips (read in place) or
            unpacked; downloaded from the authors' repository if none.
        out: directory to make; it must not exist.
        split: ``vinyals`` (Vinyals et al., NeurIPS 2016: characters of train, validation and test by list) or
            ``random`` (as many characters each, dealt by ``seed``).
        splits_dir: directory of ``vinyals_{train,val,test}.txt``; else they are looked for in ``source``, then
            downloaded.
        seed: of the random split.
        size: side of the square images in pixels, reduced from 105 with an antialiasing filter.
        shard_bytes: size after which a new tar begins.
        progress: called with (done, in all): bytes of each download, then characters.

    Raises:
        DataError: if ``out`` exists, a part or list is missing, a character does not have its 20 drawings, an
            image cannot be read, or a download fails.
    """
    if split not in ("vinyals", "random"):
        raise DataError("split", f"{split!r} is not a split of Omniglot", "use 'vinyals' or 'random'")
    if not 1 <= size <= 1024:
        raise DataError("size", f"{size} pixels", "use 1 to 1024")
    refuse_existing(Path(out))
    with ExitStack() as stack:
        urls = [f"{HOME}/{part}.zip" for part in PARTS]
        root = Path(source) if source is not None else stack.enter_context(downloaded(urls, progress))
        characters = _characters(stack.enter_context(_open(root)))
        names = sorted(characters)
        if split == "random":
            splits = deal(len(names), FRACTIONS, seed)
        else:
            lists = stack.enter_context(_lists(root if splits_dir is None else Path(splits_dir), splits_dir is None))
            splits = {s: _listed(path, names) for s, path in lists.items()}
        return pack_classes(
            out,
            [(n, lambda drawings=characters[n]: _drawn(drawings, size)) for n in names],  # type: ignore[misc]
            splits,
            Field("array", (size, size)),
            name="omniglot",
            licence=LICENCE,
            source="https://github.com/brendenlake/omniglot",
            notes={"split": split, "seed": seed if split == "random" else None},
            block_examples=DRAWERS,
            shard_bytes=shard_bytes,
            progress=progress,
        )


@contextmanager
def _open(root: Path) -> Iterator[list[SourceFile]]:
    """The files of both parts, as ``<part>/<Alphabet>/characterNN/IIII_DD.png``."""
    with ExitStack() as stack:
        files: list[SourceFile] = []
        for part in PARTS:
            if (root / f"{part}.zip").is_file():
                files += stack.enter_context(zip_files(root / f"{part}.zip"))
            elif (root / part).is_dir():
                files += [SourceFile(part / f.path, f.where, f.read) for f in folder_files(root / part)]
            else:
                mend = "give the directory that holds both parts of Omniglot, or no --source to download them"
                raise DataError(root, f"holds neither {part}.zip nor the folder {part}", mend)
        yield files


def _characters(files: Sequence[SourceFile]) -> dict[str, list[SourceFile]]:
    """Files of each character, named ``Alphabet/characterNN``, by drawer.

    Raises:
        DataError: if a file is not where a drawing belongs, or a drawer is missing or there twice.
    """
    found: dict[str, dict[str, SourceFile]] = {}
    for f in files:
        if f.path.suffix.lower() != ".png":
            continue
        image = _IMAGE.fullmatch(f.path.name)
        if len(f.path.parts) != 4 or image is None:
            raise DataError(f.where, "is not <part>/<Alphabet>/characterNN/IIII_DD.png", "remove or rename it")
        drawings = found.setdefault("/".join(f.path.parts[1:3]), {})
        if other := drawings.get(image[1]):
            raise DataError(f.where, f"drawer {image[1]} is there twice, also as {other.where}", "keep one of the two")
        drawings[image[1]] = f
    if not found:
        raise DataError(files[0].where if files else "source", "no drawings found", "give the two parts of Omniglot")
    for name, drawings in found.items():
        if len(drawings) != DRAWERS:
            folder = next(iter(drawings.values())).where.rpartition("/")[0]
            raise DataError(folder, f"{name} has {len(drawings)} drawings of {DRAWERS}", "download the images again")
    return {name: [d[k] for k in sorted(d)] for name, d in found.items()}


def _drawn(drawings: Sequence[SourceFile], size: int) -> NDArray[np.uint8]:
    """The drawings of one character, uint8 ``[20, size, size]``, ink 255 and paper 0."""
    from PIL import Image, ImageOps

    out = np.empty((len(drawings), size, size), dtype=np.uint8)
    for i, f in enumerate(drawings):
        ink = ImageOps.invert(decode.image(f.read(), f.where, mode="L", formats=("PNG",)))
        if ink.width != ink.height:
            raise DataError(f.where, f"image of {ink.width} x {ink.height} is not square", "download the images again")
        out[i] = np.asarray(ink.resize((size, size), Image.Resampling.LANCZOS))
    return out


@contextmanager
def _lists(directory: Path, may_download: bool) -> Iterator[dict[str, Path]]:
    here = {split: directory / f"vinyals_{name}.txt" for split, name in _LISTS.items()}
    missing = [p for p in here.values() if not p.is_file()]
    if not missing:
        yield here
    elif not may_download:
        raise DataError(missing[0], "no such class list", "give --splits-dir with vinyals_{train,val,test}.txt")
    else:
        with downloaded([f"{SPLITS_HOME}/{name}.txt" for name in _LISTS.values()]) as folder:
            yield {split: folder / f"{name}.txt" for split, name in _LISTS.items()}


def _listed(path: Path, names: Sequence[str]) -> list[int]:
    """Numbers of the characters that a list of ``Alphabet/characterNN/rotDDD`` names."""
    numbers = {n: i for i, n in enumerate(names)}
    turns: dict[str, set[str]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(path, f"cannot be read ({e})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, match = f"{path}:{number}", _LINE.fullmatch(line.strip())
        if match is None:
            raise DataError(where, f"{line.strip()!r} is not Alphabet/characterNN/rotDDD")
        if match[1] not in numbers:
            raise DataError(where, f"character {match[1]!r} is not among the images", "use the list of this data set")
        turns.setdefault(match[1], set()).add(match[2])
    for name, seen in turns.items():
        if len(seen) != 4:
            raise DataError(path, f"{name} is listed in {len(seen)} of its 4 rotations", "list all four, or none")
    return sorted(numbers[n] for n in turns)
