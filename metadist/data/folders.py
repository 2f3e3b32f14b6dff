"""Packing folders of pictures, or a zip of them: one folder a class, or classes by a table."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metadist.data import decode
from metadist.data.labelled import LabelTable, by_table
from metadist.data.manifest import Field, Manifest
from metadist.data.pack import BLOCK_EXAMPLES, pack_classes
from metadist.data.sources import IMAGE_SUFFIXES, Progress, SourceFile, folder_files, zip_files
from metadist.data.splits import SPLIT_NAMES, StrPath, choose, numbered
from metadist.data.tolerance import Tolerance, large_enough, named, short
from metadist.data.writer import SHARD_BYTES, refuse_existing
from metadist.errors import ConfigError, DataError

_ORIENTATION = 0x0112
_TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
          7: "TRANSVERSE", 8: "ROTATE_90"}  # fmt: skip
_READ = "PNG, JPEG, WebP, BMP, GIF and TIFF are read"


def pack_folder(
    source: StrPath,
    out: StrPath,
    *,
    size: int | None = 84,
    grayscale: bool = False,
    encoding: str = "array",
    labels: LabelTable | None = None,
    splits: StrPath | None = None,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    least: int = 2,
    on_bad: str = "error",
    most_bad: float = 0.01,
    name: str | None = None,
    licence: str = "",
    block_examples: int = BLOCK_EXAMPLES,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Manifest:
    """Packs one folder of pictures a class, ``class/*.png`` or ``split/class/*.png``.

    Folders named train, val (or valid, validation, dev) and test at the top are splits; otherwise classes are dealt
    to splits by ``fractions`` and ``seed``. Deeper folders belong to the class's name. Links are followed.
    Pictures are turned as their camera says; of a moving one the first frame is taken.

    Args:
        source: directory or zip of the pictures: PNG, JPEG, WebP, BMP, GIF or TIFF.
        out: directory to make; it must not exist.
        size: pictures are scaled and cropped about their centre to ``size`` x ``size``; None: all are of one size,
            and stay as they are.
        grayscale: one channel (``[size, size]``) instead of three (``[size, size, 3]``).
        encoding: ``array``, or ``jpeg`` or ``png`` for smaller shards that take longer to read.
        labels: tables of the class of each picture, in place of folders; pictures that they do not name are left out.
        splits: JSON file of lists of classes, ``{"train": [...], ...}``; classes that it does not name are left out.
        fractions: share of the classes in each split, by default 64, 16 and 20 %.
        seed: of the deal.
        least: pictures that a class must have.
        on_bad: what a picture that cannot be read, or a class of fewer than ``least``, means: ``error``; or ``skip``:
            it is left out, and counted by class in the manifest's notes.
        most_bad: with ``skip``, the share of the pictures that may be left out.
        name, licence, block_examples, shard_bytes, progress: as for :func:`~metadist.data.pack.pack_classes`.

    Raises:
        DataError: as :func:`~metadist.data.pack.pack_classes`, or if the folders hold too few classes, one class is too
            small or in two splits, or a picture, or too many of them, cannot be read.
        ConfigError: if splits are told in two ways.
    """
    if (size is not None and size < 1) or encoding not in ("array", "png", "jpeg"):
        raise DataError("size, encoding", f"{size} and {encoding!r}", "size is at least 1; encoding array, png or jpeg")
    refuse_existing(Path(out))
    root = Path(source)
    with source_files(root) as files:
        rows = Tolerance(root if labels is None else ", ".join(map(str, labels.paths)), "rows", on_bad, most_bad)
        groups, told = _by_folder(root, files) if labels is None else by_table(labels, _pictures(files), rows)
        if told is not None and splits is not None:
            ours = root if labels is None else rows.source
            raise ConfigError("splits", f"told by {splits}, and by {ours} itself", "give one of them")
        tolerance = Tolerance(root, "images", on_bad, most_bad, total=sum(map(len, groups.values())))
        small = large_enough({k: len(members) for k, members in groups.items()}, least, tolerance.skips, root)
        large = sorted(set(groups) - set(small))
        chosen = choose(large, told=told, listed=splits, fractions=fractions, seed=seed)
        names = sorted({n for members in chosen.values() for n in members})
        reader = _Reader("L" if grayscale else "RGB", tolerance, least, None if size is None else (size, size))
        if size is None:
            reader.take_size(groups[name] for name in names)
        notes = {"too_small": small, "in_no_split": len(large) - len(names), "left_out": tolerance.left_out}
        notes["left_out_rows"] = rows.left_out
        return pack_classes(
            out,
            [(n, lambda n=n: _encoded(reader.all(n, groups[n]), encoding)) for n in names],  # type: ignore[misc]
            numbered(chosen, names),
            Field(encoding, reader.shape),
            name=name or root.resolve().name.removesuffix(".zip"),
            licence=licence,
            notes=lambda: {k: v for k, v in notes.items() if v},
            block_examples=block_examples,
            shard_bytes=shard_bytes,
            progress=progress,
        )


@contextmanager
def source_files(root: Path) -> Iterator[list[SourceFile]]:
    """The files of a folder, or of a zip; a folder that holds all of a zip is passed over."""
    if not root.is_file():
        yield folder_files(root)
        return
    with zip_files(root) as files:
        tops = {f.path.parts[0] for f in files}
        if len(tops) == 1 and all(len(f.path.parts) > 2 for f in files):
            files = [SourceFile(f.path.relative_to(f.path.parts[0]), f.where, f.read) for f in files]
        yield files


def _pictures(files: Sequence[SourceFile]) -> list[SourceFile]:
    return [f for f in files if f.path.suffix.lower() in IMAGE_SUFFIXES]


def _no_pictures(root: Path, files: Sequence[SourceFile]) -> DataError:
    if loose := _pictures(files):
        mend = "put those of each class into a folder of its own, or give a table of their classes with --labels"
        return DataError(root, f"its {len(loose)} pictures lie in it directly", mend)
    if not files:
        return DataError(root, "holds no pictures", "give one folder of pictures a class")
    kinds = Counter(f.path.suffix.lower() or "unnamed" for f in files)
    held = ", ".join(f"{count} {kind} files" for kind, count in kinds.most_common(3))
    return DataError(root, f"holds no pictures, but {held}", f"give one folder of pictures a class; {_READ}")


def _by_folder(root: Path, every: Sequence[SourceFile]) -> tuple[dict[str, list[SourceFile]], dict[str, str] | None]:
    """Pictures by class, and the split of each class where the top folders are splits."""
    files = [f for f in _pictures(every) if len(f.path.parts) > 1]
    if not files:
        raise _no_pictures(root, every)
    tops = {f.path.parts[0] for f in files}
    splits = {top for top in tops if top.lower() in SPLIT_NAMES}
    deep = all(len(f.path.parts) > 2 for f in files)
    if deep and "train" in splits and splits != tops:
        others = named(sorted(tops - splits))
        found = f"{named(sorted(splits))} are splits by their names, but {others} beside them cannot be"
        raise DataError(root, found, "move them away, or name the classes of each split with --splits")
    by_split = deep and splits == tops
    groups: dict[str, list[SourceFile]] = {}
    owner: dict[str, str] = {}
    for f in files:
        folders = f.path.parts[:-1]
        klass = "/".join(folders[1:] if by_split else folders)
        split = SPLIT_NAMES[folders[0].lower()] if by_split else ""
        if owner.setdefault(klass, split) != split:
            raise DataError(root, f"class {short(klass)} is in splits {owner[klass]!r} and {split!r}", "keep it in one")
        groups.setdefault(klass, []).append(f)
    return groups, owner if by_split else None


@dataclass
class _Reader:
    """Reads the pictures of classes in one mode and size.

    Args:
        mode: ``L`` or ``RGB``.
        tolerance: what a bad one means.
        least: pictures that must be left of a class.
        size: (width, height) to which they are scaled; None: as they are, all of the size of the first.
    """

    mode: str
    tolerance: Tolerance
    least: int
    size: tuple[int, int] | None
    first: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a picture as an array."""
        width, height = self.size or (0, 0)
        return (height, width) if self.mode == "L" else (height, width, 3)

    def take_size(self, classes: Iterator[list[SourceFile]]) -> None:
        """Takes the size of the first picture that can be read."""
        for file in (file for members in classes for file in members):
            try:
                image = picture(file.read(), file.where, self.mode)
            except DataError:
                if not self.tolerance.skips:
                    raise
                continue
            self.size, self.first = image.size, file.where
            return
        raise DataError(self.tolerance.source, "holds no picture that can be read", _READ)

    def all(self, klass: str, files: Sequence[SourceFile]) -> list[Any]:
        """The pictures of a class that can be read."""
        found = []
        for file in files:
            try:
                found.append(self._one(file))
            except DataError as e:
                self.tolerance.bad(klass, e)
        if len(found) < self.least:
            told = f"only {len(found)} of the {len(files)} pictures of class {short(klass)} can be read"
            raise DataError(self.tolerance.source, told, "remove its folder, or mend its pictures")
        return found

    def _one(self, file: SourceFile) -> Any:
        image = picture(file.read(), file.where, self.mode)
        if not self.first:
            return fitted(image, self.size or image.size)
        if image.size != self.size:
            (width, height), (w, h) = image.size, self.size or (0, 0)
            found = f"is {width} x {height}, but {self.first} is {w} x {h}"
            raise DataError(file.where, found, "make all of one size, or have them scaled: leave out --as-is")
        return image


def picture(data: bytes, where: str, mode: str) -> Any:
    """A picture from its file's bytes, turned as its camera says: ``PIL.Image.Image`` in ``L`` or ``RGB``.

    Raises:
        DataError: if it cannot be read.
    """
    return _upright(decode.image(data, where, mode=mode, formats=decode.SOURCE_FORMATS))


def fitted(image: Any, size: tuple[int, int]) -> Any:
    """A picture scaled and cropped about its centre to (width, height)."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)


def _upright(image: Any) -> Any:
    """A photograph turned as its EXIF says; one whose EXIF is damaged is taken as it lies."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is damaged
            orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # of its parser: SyntaxError, struct.error, TypeError and more
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(Image.Transpose[turn])


def _encoded(images: Sequence[Any], encoding: str) -> NDArray[np.uint8] | list[bytes]:
    if encoding == "array" and images:
        return np.stack([np.asarray(i, dtype=np.uint8) for i in images])
    parts = []
    for image in images:
        out = io.BytesIO()
        image.save(out, format=encoding.upper(), **({"quality": 95} if encoding == "jpeg" else {}))
        parts.append(out.getvalue())
    return parts
