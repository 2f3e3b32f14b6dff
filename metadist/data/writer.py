"""Writing a shard set: beside its place, checked by reading it back, and renamed in one step."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metadist.data import decode, tars
from metadist.data.manifest import (
    INDEX,
    MANIFEST,
    Field,
    Manifest,
    ShardFile,
    block_digest,
    content_id,
    parse_manifest,
)
from metadist.data.shards import block_key
from metadist.errors import DataError
from metadist.files import sync_directory, sync_files

SHARD_BYTES = 64 << 20


class ShardWriter:
    """Writes class blocks into tars of one directory, deterministically: equal input gives equal bytes.

    Args:
        directory: an existing, empty directory.
        field: how examples are kept.
        block_examples: most examples in a block; a class of more is cut into blocks as equal as can be.
        shard_bytes: payload after which a new tar begins.
    """

    def __init__(self, directory: Path, field: Field, block_examples: int, shard_bytes: int = SHARD_BYTES) -> None:
        if block_examples < 1:
            raise DataError("block_examples", f"{block_examples} is too few", "it must be at least 1")
        self.directory, self.field, self.block_examples, self.shard_bytes = (
            directory,
            field,
            block_examples,
            shard_bytes,
        )
        self._tar: tarfile.TarFile | None = None
        self._shards = 0

    def add(self, klass: int, name: str, examples: NDArray[np.uint8] | Sequence[bytes]) -> None:
        """Writes a class: uint8 ``[n, *shape]`` for arrays, or n encoded examples."""
        n = len(examples)
        if n == 0:
            raise DataError(name, "a class without examples", "leave it out")
        cuts = np.linspace(0, n, -(-n // self.block_examples) + 1).astype(int)
        for block, (a, z) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            head: dict[str, Any] = {"class": klass, "name": name, "block": block, "n": int(z - a)}
            part = examples[a:z]
            if self.field.encoding == "array":
                payload = _npy_bytes(np.asarray(part), self.field, name)
            else:
                head["offsets"] = [0, *np.cumsum([len(e) for e in part]).tolist()]
                payload = b"".join(part)
            self._write(block_key(klass, block), json.dumps(head, sort_keys=True).encode(), payload)

    def _write(self, key: str, head: bytes, payload: bytes) -> None:
        if self._tar is None or self._tar.offset >= self.shard_bytes:
            self.close()
            path = self.directory / f"shard-{self._shards:05d}.tar"
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (open across calls)
            self._shards += 1
        for extension, data in (("json", head), (self.field.member, payload)):
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size, member.mode = len(data), 0o444  # mtime, uid and gid are 0, the names empty
            self._tar.addfile(member, io.BytesIO(data))

    def close(self) -> None:
        """Ends the open tar."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None


def _npy_bytes(array: NDArray[Any], field: Field, name: str) -> bytes:
    if array.dtype != np.uint8 or array.shape[1:] != field.shape:
        raise DataError(name, f"examples are {array.dtype} {list(array.shape[1:])}", f"give uint8 {list(field.shape)}")
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return out.getvalue()


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A hidden directory beside ``out`` that becomes ``out`` if the block ends well, and goes if it does not.

    Raises:
        DataError: if ``out`` exists, or the disk is full or cannot be written to.
    """
    refuse_existing(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as e:
        raise _unwritable(out, e) from e
    try:
        yield part
        sync_files(part)
        part.chmod(0o755)
        _publish(part, out)
    except OSError as e:
        raise _unwritable(out, e) from e
    finally:
        shutil.rmtree(part, ignore_errors=True)  # gone already if it was published


def refuse_existing(out: Path) -> None:
    """Raises DataError if there is anything at ``out``."""
    if os.path.lexists(out):
        raise _exists(out)


def _exists(out: Path) -> DataError:
    return DataError(out, "exists already", "remove it or choose another directory")


def _unwritable(out: Path, e: OSError) -> DataError:
    mend = "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another directory"
    return DataError(out, f"cannot be written ({e.strerror or e})", mend)


def _publish(part: Path, out: Path) -> None:
    """Renames in one step. Another process may have made ``out`` meanwhile; it is left alone."""
    refuse_existing(out)
    try:
        part.rename(out)
    except OSError as e:
        if e.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _exists(out) from None
        raise
    sync_directory(out.parent)


def file_entry(path: Path) -> ShardFile:
    """Name, size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardFile(path.name, path.stat().st_size, digest)


def scan_blocks(path: Path, shard: int, field: Field) -> list[dict[str, Any]]:
    """The blocks of one tar as rows of an index, each with its ``digest`` for the content id.

    Raises:
        DataError: if the tar is damaged or holds anything but pairs of json and payload.
    """
    members = tars.scan(path)
    rows = []
    with path.open("rb") as file:
        for head, body in zip(members[::2], [*members[1::2], None][: len(members[::2])], strict=True):
            key = head.name.partition(".")[0]
            if head.name != f"{key}.json" or body is None or body.name != f"{key}.{field.member}":
                names = f"{head.name!r} and {body.name if body else 'nothing'!r}"
                raise DataError(path, f"members {names} are not a block's pair of .json and .{field.member}")
            file.seek(head.offset)
            head_bytes = file.read(head.size)
            file.seek(body.offset)
            rows.append(_row(f"{path}:{key}", key, shard, (head, head_bytes), (body, file.read(body.size))))
    return rows


def _row(
    where: str, key: str, shard: int, head: tuple[tars.Member, bytes], body: tuple[tars.Member, bytes]
) -> dict[str, Any]:
    said = decode.json_object(head[1], f"{where}.json")
    try:
        klass, block, n = (int(said[k]) for k in ("class", "block", "n"))
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{where}.json", "lacks class, block or n as whole numbers") from None
    if key != block_key(klass, block) or n < 1:
        raise DataError(f"{where}.json", f"says class {klass}, block {block}, n {n}, which is not {key}")
    return {
        "class": klass, "block": block, "n": n, "shard": shard,
        "offset": body[0].offset, "size": body[0].size, "crc32": zlib.crc32(body[1]),
        "json_offset": head[0].offset, "json_size": head[0].size, "json_crc32": zlib.crc32(head[1]),
        "digest": block_digest(klass, block, n, body[1], said.get("offsets")),
    }  # fmt: skip


def seal(
    directory: Path,
    *,
    name: str,
    field: Field,
    classes: Sequence[str],
    splits: Mapping[str, Sequence[int]],
    licence: str = "",
    source: str = "",
    notes: Mapping[str, Any] | None = None,
) -> Manifest:
    """Makes the tars in ``directory`` a shard set: reads them back, writes the index, then the manifest.

    The tars may come from :class:`ShardWriter` or from any writer of WebDataset tars that keeps to the names and
    json of the format.

    Raises:
        DataError: if a tar is damaged, a class has no block, or the splits contradict each other.
    """
    paths = sorted(directory.glob("*.tar"))
    rows = [row for shard, path in enumerate(paths) for row in scan_blocks(path, shard, field)]
    rows.sort(key=lambda r: (r["class"], r["block"]))
    pairs = [(r["class"], r["block"]) for r in rows]
    if len(set(pairs)) != len(pairs) or {c for c, _ in pairs} != set(range(len(classes))):
        raise DataError(directory, f"the tars do not hold each block of the {len(classes)} classes once")
    columns = {k: np.array([r[k] for r in rows], dtype=np.int64) for k in rows[0] if k != "digest"} if rows else {}
    if not rows:
        raise DataError(directory, "no classes to write", "give at least one class")
    np.savez(directory / INDEX, **columns)  # type: ignore[arg-type]
    manifest = Manifest(
        name=name,
        field=field,
        classes=tuple(classes),
        splits={k: tuple(sorted(int(c) for c in v)) for k, v in splits.items()},
        shards=tuple(file_entry(p) for p in paths),
        index=file_entry(directory / INDEX),
        blocks=len(rows),
        examples=int(columns["n"].sum()),
        content_id=content_id(
            field, classes, {k: sorted(int(c) for c in v) for k, v in splits.items()}, (r["digest"] for r in rows)
        ),
        licence=licence,
        source=source,
        notes=dict(notes or {}),
    )
    text = manifest.to_json().encode()
    parse_manifest(text, str(directory / MANIFEST))  # refuses what a reader would refuse
    (directory / MANIFEST).write_bytes(text)
    return manifest
