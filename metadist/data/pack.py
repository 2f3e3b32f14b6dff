"""Packing arrays and folders of images as shard sets; :mod:`metadist.data.omniglot` packs Omniglot."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metadist.data import decode
from metadist.data.manifest import Field, Manifest
from metadist.data.sources import IMAGE_SUFFIXES, Progress, SourceFile, folder_files
from metadist.data.splits import FRACTIONS, SPLIT_NAMES, StrPath, deal
from metadist.data.writer import SHARD_BYTES, ShardWriter, new_directory, seal
from metadist.errors import DataError

BLOCK_EXAMPLES = 50


def pack_classes(
    out: StrPath,
    classes: Iterable[tuple[str, Callable[[], NDArray[np.uint8] | Sequence[bytes]]]],
    splits: Mapping[str, Sequence[int]],
    field: Field,
    *,
    name: str,
    licence: str = "",
    source: str = "",
    notes: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    block_examples: int = BLOCK_EXAMPLES,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Manifest:
    """Packs classes one at a time, so that a set may be larger than memory.

    Args:
        out: directory to make; it must not exist. It appears whole, or not at all.
        classes: (name, function that gives its examples: uint8 ``[n, *shape]`` or n encoded ones).
        splits: numbers of the classes of each split, a class in one at most.
        field: how examples are kept.
        name, licence, source, notes: what the manifest says of the set; notes may be told at the end, by a function.
        block_examples: most examples in a block.
        shard_bytes: size after which a new tar begins.
        progress: called with (classes done, classes in all).

    Raises:
        DataError: if ``out`` exists or cannot be written, or a class or split cannot be used.
    """
    classes = list(classes)
    names = [n for n, _ in classes]
    with new_directory(Path(out)) as directory:
        writer = ShardWriter(directory, field, block_examples, shard_bytes)
        try:
            for number, (class_name, load) in enumerate(classes):
                writer.add(number, class_name, load())
                if progress:
                    progress(number + 1, len(classes))
        finally:
            writer.close()
        return seal(
            directory, name=name, field=field, classes=names, splits=splits, licence=licence, source=source,
            notes=notes() if callable(notes) else notes,
        )  # fmt: skip


def pack_arrays(
    images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
    names: Sequence[str],
    splits: Mapping[str, Sequence[int | str]],
    out: StrPath,
    *,
    name: str = "arrays",
    licence: str = "",
    source: str = "",
    block_examples: int = BLOCK_EXAMPLES,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Manifest:
    """Packs images that are in memory.

    Args:
        images: uint8 ``[classes, examples, H, W]`` or ``[classes, examples, H, W, C]``, or one array a class.
        names: name of each class.
        splits: classes of each split, by number or name.
        out, name, licence, source, block_examples, shard_bytes, progress: as for :func:`pack_classes`.

    Raises:
        DataError: as :func:`pack_classes`, or if names and images do not match, or a split names no class.
    """
    if len(names) != len(images) or not len(names):
        raise DataError("names", f"{len(names)} names for {len(images)} classes", "give a name for each class")
    numbers = {n: i for i, n in enumerate(names)}
    chosen = {}
    for split, members in splits.items():
        for member in members:
            if isinstance(member, str) and member not in numbers:
                raise DataError(f"splits.{split}", f"no class is named {member!r}", "name a class of the set")
        chosen[split] = [numbers[m] if isinstance(m, str) else int(m) for m in members]
    return pack_classes(
        out,
        [(n, lambda a=a: np.asarray(a)) for n, a in zip(names, images, strict=True)],  # type: ignore[misc]
        chosen,
        Field("array", tuple(int(s) for s in images[0].shape[1:])),
        name=name,
        licence=licence,
        source=source,
        block_examples=block_examples,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def pack_folder(
    source: StrPath,
    out: StrPath,
    *,
    size: int = 84,
    grayscale: bool = False,
    encoding: str = "array",
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    on_bad: str = "error",
    most_bad: float = 0.01,
    name: str | None = None,
    licence: str = "",
    block_examples: int = BLOCK_EXAMPLES,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Manifest:
    """Packs one folder of PNG or JPEG images a class, ``class/*.png`` or ``split/class/*.png``.

    Folders named train, val (or valid, validation) and test at the top are splits; otherwise classes are dealt
    to splits by ``fractions`` and ``seed``. Deeper folders belong to the class's name.

    Args:
        source: directory of the images.
        out: directory to make; it must not exist.
        size: images are scaled and cropped about their centre to ``size`` x ``size``.
        grayscale: one channel (``[size, size]``) instead of three (``[size, size, 3]``).
        encoding: ``array``, or ``jpeg`` or ``png`` for smaller shards that take longer to read.
        fractions: share of the classes in each split, by default 64, 16 and 20 %.
        seed: of the deal.
        on_bad: what an image that cannot be read means: ``error``; or ``skip``: it is left out, and counted by class
            in the manifest's notes.
        most_bad: with ``skip``, the share of the images that may be left out.
        name, licence, block_examples, shard_bytes, progress: as for :func:`pack_classes`.

    Raises:
        DataError: as :func:`pack_classes`, or if the folders hold no class, one class is in two splits, or an
            image, or too many of them, cannot be read.
    """
    if on_bad not in ("error", "skip"):
        raise DataError("on_bad", f"{on_bad!r}", "write error or skip")
    if size < 1 or encoding not in ("array", "png", "jpeg"):
        raise DataError("size, encoding", f"{size} and {encoding!r}", "size is at least 1; encoding array, png or jpeg")
    root = Path(source)
    files = [f for f in folder_files(root) if f.path.suffix.lower() in IMAGE_SUFFIXES and len(f.path.parts) > 1]
    if not files:
        raise DataError(root, "holds no folder of .png or .jpg images", "give one folder a class")
    groups, splits = _group(files, root)
    names = sorted(groups)
    if splits is None:
        splits = deal(len(names), FRACTIONS if fractions is None else fractions, seed)
    else:
        splits = {s: [names.index(n) for n in sorted(members)] for s, members in splits.items()}
    mode, shape = ("L", (size, size)) if grayscale else ("RGB", (size, size, 3))

    bad: list[str] = []
    left_out: dict[str, int] = {}
    most = int(most_bad * len(files)) if on_bad == "skip" else 0

    def fitted(klass: str) -> Iterator[Any]:
        for file in groups[klass]:
            try:
                yield _fitted(file, size, mode)
            except DataError as e:
                if on_bad == "error":
                    raise
                bad.append(str(e))
                left_out[klass] = left_out.get(klass, 0) + 1
                if len(bad) > most:
                    some = "".join(f"\n  {why}" for why in bad[:5])
                    told = f"more than {most} of {len(files)} images cannot be read:{some}\n"
                    raise DataError(root, told, "mend or remove them, or raise most_bad") from None

    def loader(klass: str) -> Callable[[], NDArray[np.uint8] | list[bytes]]:
        return lambda: _encoded(list(fitted(klass)), encoding)

    return pack_classes(
        out,
        [(n, loader(n)) for n in names],
        splits,
        Field(encoding, shape),
        name=name or root.resolve().name,
        licence=licence,
        notes=lambda: {"left_out": left_out} if left_out else {},
        block_examples=block_examples,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def _group(files: Sequence[SourceFile], root: Path) -> tuple[dict[str, list[SourceFile]], dict[str, list[Any]] | None]:
    """Files by class, and class names by split where the top folders are splits."""
    tops = {f.path.parts[0] for f in files}
    by_split = tops <= set(SPLIT_NAMES) and all(len(f.path.parts) > 2 for f in files)
    groups: dict[str, list[SourceFile]] = {}
    owner: dict[str, str] = {}
    for f in files:
        folders = f.path.parts[:-1]
        klass = "/".join(folders[1:] if by_split else folders)
        split = SPLIT_NAMES[folders[0]] if by_split else ""
        if owner.setdefault(klass, split) != split:
            raise DataError(root, f"class {klass!r} is in splits {owner[klass]!r} and {split!r}", "keep it in one")
        groups.setdefault(klass, []).append(f)
    if not by_split:
        return groups, None
    return groups, {s: [c for c, o in owner.items() if o == s] for s in sorted(set(owner.values()))}


def _fitted(file: SourceFile, size: int, mode: str) -> Any:
    from PIL import Image, ImageOps

    image = decode.image(file.read(), file.where, mode=mode)
    return ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)


def _encoded(images: Sequence[Any], encoding: str) -> NDArray[np.uint8] | list[bytes]:
    if encoding == "array" and images:
        return np.stack([np.asarray(i, dtype=np.uint8) for i in images])
    parts = []
    for image in images:
        out = io.BytesIO()
        image.save(out, format=encoding.upper(), **({"quality": 95} if encoding == "jpeg" else {}))
        parts.append(out.getvalue())
    return parts
