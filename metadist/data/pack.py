"""Packing classes one after another, and images in memory. The modules beside this one pack what people have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metadist.data.manifest import Field, Manifest
from metadist.data.sources import Progress
from metadist.data.splits import StrPath
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
