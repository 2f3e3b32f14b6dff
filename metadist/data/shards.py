"""The format ``metadist.shards/1``: class blocks in plain WebDataset tars, an index to seek in, a manifest.

A shard set is a directory::

    shard-00000.tar ...   members c00012-0003.json and c00012-0003.x.npy (or .x.bin), a pair for each block
    index.npz             where each block lies: one seek reads it
    metadist.json         written last, the commit mark: what the set is, and the checksums of the above

A *class block* is up to M examples of one class: in ``.x.npy`` a uint8 array ``[n, *shape]``, in ``.x.bin`` n
concatenated images or UTF-8 texts with their ``offsets`` in the json.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metadist.data import decode
from metadist.data.manifest import INDEX, Manifest, ShardFile, load_manifest
from metadist.data.planes import empty_images, planes
from metadist.data.samplers import ClassPool, Ints
from metadist.errors import DataError, first_line

_INDEX_COLUMNS = ("class", "block", "n", "shard", "offset", "size", "crc32", "json_offset", "json_size", "json_crc32")
_MOST_HEADER = 4096
_AGAIN = "pack or copy the set again"
_NOT_SENT = ("_paths", "_files", "_cache", "_cached", "_lock")


@dataclass(frozen=True)
class Index:
    """Where each of B blocks lies, sorted by (class, block). Columns are int64 ``[B]``.

    ``offset``, ``size`` and ``crc32`` are those of the payload within its tar, ``json_*`` those of its json.
    """

    columns: Mapping[str, Ints]

    def __len__(self) -> int:
        return len(self.columns["class"])

    def __getitem__(self, column: str) -> Ints:
        return self.columns[column]

    @property
    def rows(self) -> Ints:
        """First row of each block among all examples, int64 ``[B + 1]``."""
        return np.concatenate([[0], np.cumsum(self.columns["n"])]).astype(np.int64)

    def without(self, keys: Collection[str]) -> Index:
        """The same without some blocks."""
        if not keys:
            return self
        kept = np.array([self.key(b) not in keys for b in range(len(self))])
        return Index({name: column[kept] for name, column in self.columns.items()})

    def key(self, b: int) -> str:
        """Name of block ``b``'s members in the tar, without extension."""
        return block_key(int(self["class"][b]), int(self["block"][b]))


def block_key(klass: int, block: int) -> str:
    """``c00012-0003`` for block 3 of class 12."""
    return f"c{klass:05d}-{block:04d}"


def read_index(path: Path, manifest: Manifest) -> Index:
    """Reads ``index.npz``, checked against the manifest.

    Raises:
        DataError: if it is missing, altered, or disagrees with the manifest.
    """
    try:
        if path.stat().st_size > manifest.index.bytes:  # it is not read to find that out
            raise DataError(path, f"has {path.stat().st_size} bytes, not the manifest's {manifest.index.bytes}", _AGAIN)
        data = path.read_bytes()
    except OSError as e:
        raise DataError(path, f"cannot be read ({e.strerror})", _AGAIN) from None
    if hashlib.sha256(data).hexdigest() != manifest.index.sha256:
        raise DataError(path, "altered: its SHA-256 is not the manifest's", _AGAIN)
    try:
        columns = _columns(data, manifest.blocks)
    except Exception as e:  # of the zip, its compression, the arrays' headers: each has errors of its own
        raise DataError(path, f"is not an index ({type(e).__name__}: {first_line(e)})", _AGAIN) from None
    index = Index(columns)
    if {len(c) for c in columns.values()} != {manifest.blocks} or int(index["n"].sum()) != manifest.examples:
        wanted = f"{manifest.blocks} blocks of {manifest.examples} examples"
        raise DataError(path, f"does not hold the manifest's {wanted}", _AGAIN)
    covered = np.array_equal(np.unique(index["class"]), np.arange(len(manifest.classes)))
    if index["n"].min(initial=1) < 1:
        raise DataError(path, "names a block without examples", _AGAIN)
    if not covered or index["shard"].max(initial=-1) >= len(manifest.shards) or index["shard"].min(initial=0) < 0:
        raise DataError(path, f"does not cover the manifest's {len(manifest.classes)} classes", _AGAIN)
    sizes = np.array([shard.bytes for shard in manifest.shards], dtype=np.int64)
    for prefix in ("", "json_"):
        start, size = index[prefix + "offset"], index[prefix + "size"]
        # Compared without adding, which could overflow.
        if start.min(initial=0) < 0 or size.min(initial=0) < 0 or (size > sizes[index["shard"]] - start).any():
            raise DataError(path, "names bytes outside of its shards", _AGAIN)
    if not np.array_equal(np.lexsort((index["block"], index["class"])), np.arange(len(index))):
        raise DataError(path, "its blocks are not in order", _AGAIN)
    return index


def _columns(data: bytes, blocks: int) -> dict[str, Ints]:
    """The columns of an index of ``blocks`` blocks; what would unpack to more than they need is not unpacked."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            if entry.file_size > 8 * blocks + _MOST_HEADER:
                raise ValueError(f"{entry.filename} holds {entry.file_size} bytes, for {blocks} blocks")
        columns = {}
        for name in _INDEX_COLUMNS:
            column = decode.npy(archive.read(f"{name}.npy"), name)
            if column.dtype.kind not in "iu" or column.ndim != 1:
                raise ValueError(f"{name} holds {column.dtype} {list(column.shape)}, wanted a row of whole numbers")
            columns[name] = column.astype(np.int64)
    return columns


class ShardSet:
    """A shard set opened for reading; blocks are read by one seek each and checked as they are read.

    Opening checks the manifest, the index, and that each shard is there and of its size; what a shard holds is
    checked block by block (:meth:`block`), or all at once by :func:`metadist.data.verify.verify`.

    Args:
        path: the directory.
        cache_bytes: decoded blocks kept for the next reader.
        left_out: keys of blocks that are not to be there, e.g. ``c00012-0003``: they cannot be read. None takes the
            shards as they are, cut or missing, to look for such blocks (:func:`metadist.data.verify.bad_blocks`).

    Raises:
        DataError: if it is missing, not a shard set, of a newer schema, or a file is missing or cut.
    """

    def __init__(
        self, path: str | os.PathLike[str], cache_bytes: int = 256 << 20, left_out: Collection[str] | None = ()
    ) -> None:
        self.path, self.cache_bytes = Path(path), cache_bytes
        self.manifest = load_manifest(self.path)
        self._reset()
        if left_out is not None and not left_out:
            for file, shard in zip(self._paths, self.manifest.shards, strict=True):
                check_size(file, shard)
        self.index = read_index(self.path / INDEX, self.manifest).without(left_out or ())
        self.rows = self.index.rows

    def _reset(self) -> None:
        self._paths = [self.path / shard.name for shard in self.manifest.shards]
        self._files: dict[int, int] = {}
        self._cache: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._cached = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Open files and cached blocks stay behind when a set is sent to another process."""
        return {k: v for k, v in self.__dict__.items() if k not in _NOT_SENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def where(self, b: int) -> str:
        """File and member of block ``b``, for messages."""
        path = self._paths[int(self.index["shard"][b])]
        return f"{path}:{self.index.key(b)}.{self.manifest.field.member}"

    def _read(self, b: int, prefix: str) -> bytes:
        offset, size, crc = (int(self.index[prefix + column][b]) for column in ("offset", "size", "crc32"))
        shard = int(self.index["shard"][b])
        try:
            with self._lock:
                if shard not in self._files:
                    self._files[shard] = os.open(self._paths[shard], os.O_RDONLY)
                file = self._files[shard]
            data = os.pread(file, size, offset)
        except OSError as e:
            raise DataError(self._paths[shard], f"cannot be read ({e.strerror})", _AGAIN) from None
        if len(data) != size:
            raise DataError(self.where(b), f"is cut: {len(data)} bytes of {size} at byte {offset}", _AGAIN)
        if zlib.crc32(data) != crc:
            raise DataError(self.where(b), "altered: its crc32 is not the index's", _AGAIN)
        return data

    def raw(self, b: int) -> tuple[bytes, bytes]:
        """The json and the payload of block ``b``, read by one seek each and checked by crc32.

        Raises:
            DataError: if either is cut or altered.
        """
        return self._read(b, "json_"), self._read(b, "")

    def parts(self, b: int) -> list[bytes]:
        """The examples of a ``.x.bin`` block as bytes."""
        head, data = self.raw(b)
        offsets = decode.json_object(head, self.where(b)).get("offsets")
        return decode.cut(data, offsets, int(self.index["n"][b]), self.where(b))

    def texts(self, b: int) -> list[str]:
        """The examples of a block of texts, in order.

        Raises:
            DataError: if the set holds images, or the block is damaged or not UTF-8.
        """
        if self.manifest.field.encoding != "utf-8":
            raise DataError(self.where(b), "holds images, not text", "read it with block()")
        try:
            return [part.decode() for part in self.parts(b)]
        except UnicodeDecodeError as e:
            raise DataError(self.where(b), f"is not UTF-8 ({e})", _AGAIN) from None

    def decode(self, b: int, head: bytes | None, payload: bytes) -> NDArray[np.uint8]:
        """The examples of an image block, uint8 ``[n, *shape]``, from its checked bytes; do not alter it.

        Colours come plane by plane in memory (:mod:`metadist.data.planes`), as they will be used.

        Raises:
            DataError: if they are not what the manifest says.
        """
        where, kept, n = self.where(b), self.manifest.field, int(self.index["n"][b])
        if kept.encoding == "utf-8":
            raise DataError(where, "holds text, not images", "read it with texts()")
        if kept.encoding != "array":
            offsets = decode.json_object(head or b"", where).get("offsets")
            return decode.examples(kept.encoding, decode.cut(payload, offsets, n, where), kept.shape, where)
        array = decode.npy(payload, where)
        if array.dtype != np.uint8 or array.shape != (n, *kept.shape):
            wanted = f"uint8 {[n, *kept.shape]}"
            raise DataError(where, f"holds {array.dtype} {list(array.shape)}, but the index says {wanted}", _AGAIN)
        if array.ndim < 4:
            return array
        out = empty_images(n, kept.shape)
        planes(out)[:] = planes(array)
        return out

    def read(self, b: int) -> NDArray[np.uint8]:
        """Block ``b`` from the disk, checked and decoded, uint8 ``[n, *shape]``."""
        needs_json = self.manifest.field.encoding != "array"
        return self.decode(b, self._read(b, "json_") if needs_json else None, self._read(b, ""))

    def block(self, b: int) -> NDArray[np.uint8]:
        """As :meth:`read`, but kept for the next to ask; do not alter it."""
        array = self.kept(b)
        return self.keep(b, self.read(b)) if array is None else array

    def kept(self, b: int) -> NDArray[np.uint8] | None:
        """Block ``b`` if it was read before and kept."""
        with self._lock:
            if b not in self._cache:
                return None
            self._cache.move_to_end(b)
            return self._cache[b]

    def keep(self, b: int, array: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Keeps a block that was read, and lets go of those that were asked for longest ago beyond ``cache_bytes``."""
        with self._lock:
            if b not in self._cache:
                self._cache[b] = array
                self._cached += array.nbytes
            while self._cached > self.cache_bytes and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
        return array

    def gather(self, rows: Ints) -> NDArray[np.uint8]:
        """Examples by their rows, uint8 ``[R, *shape]``; each block is read once."""
        blocks = np.searchsorted(self.rows, rows, side="right") - 1
        out = empty_images(len(rows), self.manifest.field.shape)
        order = np.argsort(blocks, kind="stable")
        edges = np.flatnonzero(np.diff(blocks[order], prepend=-1, append=len(self.index))).tolist()
        places, within = order.tolist(), (rows - self.rows[blocks])[order].tolist()
        to = planes(out)
        for a, z in zip(edges[:-1], edges[1:], strict=True):
            block = planes(self.block(int(blocks[places[a]])))
            for place, i in zip(places[a:z], within[a:z], strict=True):
                to[place] = block[i]
        return out

    def classes_of(self, split: str) -> Ints:
        """Numbers of a split's classes, int64, ascending; ``"train+validation"`` joins two.

        Raises:
            DataError: if the set lacks the split.
        """
        names = split.split("+")
        for name in names:
            if name not in self.manifest.splits:
                has = ", ".join(sorted(self.manifest.splits)) or "none"
                raise DataError(self.path, f"has no split {name!r}", f"it has {has}")
        return np.array(sorted({c for name in names for c in self.manifest.splits[name]}), dtype=np.int64)

    def pool(self, split: str, turned: bool = False) -> ClassPool:
        """The classes of a split for a sampler; if ``turned``, each quarter turn of a class is one of its own."""
        base = np.intersect1d(self.classes_of(split), self.index["class"])  # of some, all blocks may be left out
        turns = np.arange(4 if turned else 1, dtype=np.int64)
        first = np.searchsorted(self.index["class"], base)
        blocks = np.searchsorted(self.index["class"], base, side="right") - first
        names = [self.manifest.classes[c] for c in base]
        quarter = len(turns)
        return ClassPool(
            names=[n for n in names for _ in turns],
            turns=np.tile(turns, len(base)),
            first_block=np.repeat(first, quarter),
            blocks=np.repeat(blocks, quarter),
            block_rows=self.rows,
        )

    def close(self) -> None:
        """Closes the files; the next read opens them again."""
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()
            self._cache.clear()
            self._cached = 0


def check_size(path: Path, shard: ShardFile) -> None:
    """Raises DataError if the file is missing or not of the size the manifest gives."""
    try:
        size = path.stat().st_size
    except OSError:
        raise DataError(path, "is missing, but the manifest names it", _AGAIN) from None
    if size < shard.bytes:
        raise DataError(path, f"is cut: {size} bytes of {shard.bytes}", _AGAIN)
    if size > shard.bytes:
        raise DataError(path, f"has {size} bytes, but the manifest says {shard.bytes}", _AGAIN)
