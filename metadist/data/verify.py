"""Checking a whole shard set, byte by byte, and telling what is in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metadist.data.manifest import INDEX, Manifest, content_id, load_manifest
from metadist.data.shards import Index, ShardSet, read_index
from metadist.data.sources import Progress
from metadist.data.writer import file_entry, scan_blocks
from metadist.errors import DataError


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found to be whole."""

    path: str
    shards: int
    blocks: int
    examples: int
    bytes: int
    content_id: str


def info(path: str | Path) -> dict[str, Any]:
    """What a shard set holds, from its manifest: nothing else is read.

    Returns:
        ``name, content_id, licence, source, encoding, shape, classes, splits`` (classes of each), ``examples,
        blocks, shards, bytes, notes``.

    Raises:
        DataError: if it is not a shard set.
    """
    m = load_manifest(Path(path))
    return {
        "name": m.name,
        "content_id": m.content_id,
        "licence": m.licence,
        "source": m.source,
        "encoding": m.field.encoding,
        "shape": list(m.field.shape),
        "classes": len(m.classes),
        "splits": {split: len(members) for split, members in m.splits.items()},
        "examples": m.examples,
        "blocks": m.blocks,
        "shards": len(m.shards),
        "bytes": sum(s.bytes for s in m.shards) + m.index.bytes,
        "notes": dict(m.notes),
    }


def verify(path: str | Path, progress: Progress | None = None) -> Report:
    """Reads every byte of a shard set and checks it against manifest and index.

    Checked: size and SHA-256 of every file; that each tar reads to its end, block by block, as the index says
    (place, size, crc32, class, block, count); that every block decodes; that no class is in two splits, none is
    missing, and no file is there that the manifest does not name; the ``content_id``.

    Args:
        path: directory of the set.
        progress: called with (shards done, shards in all).

    Raises:
        DataError: listing all problems found, each with its file.
    """
    path = Path(path)
    manifest = load_manifest(path)
    problems: list[str] = []

    def attempt(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except DataError as e:
            problems.append(str(e))
            return None

    index = attempt(lambda: read_index(path / INDEX, manifest))
    digests: dict[tuple[int, int], bytes] = {}
    for number, shard in enumerate(manifest.shards):
        file = path / shard.name
        _compare_file(file, shard, problems)
        rows = None
        if file.exists():
            rows = attempt(lambda file=file, number=number: scan_blocks(file, number, manifest.field))  # type: ignore[misc]
        for row in rows or ():
            digests[row["class"], row["block"]] = row["digest"]
        if rows is not None and index is not None:
            problems += _compare_index(file, number, rows, index)
        if progress:
            progress(number + 1, len(manifest.shards))
    named = {s.name for s in manifest.shards}
    problems += [f"{p}: is not named by the manifest" for p in sorted(path.glob("*.tar")) if p.name not in named]
    if not problems:
        problems += _check_content(path, manifest, digests)
    if problems:
        unique = list(dict.fromkeys(problems))
        count = "1 problem" if len(unique) == 1 else f"{len(unique)} problems"
        raise DataError(path, "\n  ".join([f"{count} found", *unique]))
    size = sum(s.bytes for s in manifest.shards) + manifest.index.bytes
    return Report(str(path), len(manifest.shards), manifest.blocks, manifest.examples, size, manifest.content_id)


def bad_blocks(path: str | Path, progress: Progress | None = None) -> dict[str, str]:
    """Blocks of a shard set that cannot be read: their keys, and what is wrong with each.

    Args:
        path: directory of the set; its manifest and index must be whole.
        progress: called with (blocks done, blocks in all).

    Raises:
        DataError: manifest or index cannot be read.
    """
    shards = ShardSet(path, left_out=None)
    found = {shards.index.key(b): why for b, why in _unreadable(shards, progress)}
    shards.close()
    return found


def _unreadable(shards: ShardSet, progress: Progress | None = None) -> Iterator[tuple[int, str]]:
    """The blocks that cannot be read as what the manifest says, and what is wrong with each."""
    for b in range(len(shards.index)):
        try:
            if shards.manifest.field.encoding == "utf-8":
                shards.texts(b)
            else:
                shards.read(b)
        except DataError as e:
            yield b, str(e)
        if progress:
            progress(b + 1, len(shards.index))


def class_of(key: str) -> int:
    """The number of the class of a block, by its key."""
    return int(key[1:].partition("-")[0])


def _compare_file(file: Path, shard: Any, problems: list[str]) -> None:
    try:
        found = file_entry(file)
    except OSError as e:
        problems.append(f"{file}: is missing or cannot be read ({e.strerror})")
        return
    if found.bytes != shard.bytes:
        problems.append(f"{file}: has {found.bytes} bytes, but the manifest says {shard.bytes}")
    elif found.sha256 != shard.sha256:
        problems.append(f"{file}: altered: its SHA-256 is not the manifest's")


def _compare_index(file: Path, number: int, rows: list[dict[str, Any]], index: Index) -> list[str]:
    """Problems of one shard's blocks against the index."""
    wanted = {}
    for b in np.flatnonzero(index["shard"] == number):
        wanted[index.key(int(b))] = {name: int(column[b]) for name, column in index.columns.items()}
    problems = []
    for row in rows:
        key = f"c{row['class']:05d}-{row['block']:04d}"
        expected: Mapping[str, int] | None = wanted.pop(key, None)
        if expected is None:
            problems.append(f"{file}:{key}: is not in the index")
            continue
        differs = [name for name in expected if expected[name] != row[name]]
        if differs:
            problems.append(f"{file}:{key}: {', '.join(differs)} differ from the index")
    return problems + [f"{file}:{key}: is in the index but not in the shard" for key in wanted]


def _check_content(path: Path, manifest: Manifest, digests: dict[tuple[int, int], bytes]) -> list[str]:
    problems = []
    found = content_id(manifest.field, manifest.classes, manifest.splits, (digests[k] for k in sorted(digests)))
    if found != manifest.content_id:
        problems.append(f"{path}: content_id is {found}, but the manifest says {manifest.content_id}")
    shards = ShardSet(path)
    problems += [why for _, why in _unreadable(shards)]
    shards.close()
    return problems
