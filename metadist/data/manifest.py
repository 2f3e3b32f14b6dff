"""The manifest of a shard set, ``metadist.json``: what the set is, and the checksums of its files."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from metadist.data import decode
from metadist.errors import DataError

SCHEMA = "metadist.shards/1"
MANIFEST = "metadist.json"
INDEX = "index.npz"
ENCODINGS = ("array", "png", "jpeg", "utf-8")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.tar")
_LEAST_BLOCK = 1024  # two tar headers
_AGAIN = "pack or copy the set again"


@dataclass(frozen=True)
class Field:
    """How the examples of a set are kept.

    Args:
        encoding: ``array`` (``.x.npy``), or ``png``, ``jpeg``, ``utf-8`` (``.x.bin``).
        shape: shape of one example as an array, ``(H, W)`` or ``(H, W, C)``; empty for text.
    """

    encoding: str
    shape: tuple[int, ...] = ()

    @property
    def member(self) -> str:
        """Extension of the payload in the tar."""
        return "x.npy" if self.encoding == "array" else "x.bin"


@dataclass(frozen=True)
class ShardFile:
    """A file of the set, with its size and SHA-256 (hexadecimal)."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What ``metadist.json`` says.

    Args:
        name: what the set is called.
        field: how its examples are kept.
        classes: names; a class's number is its place in this list.
        splits: numbers of the classes of each split; no class is in two.
        shards: the tars, in the order of the index's ``shard`` column.
        index: the index file.
        blocks, examples: how many there are.
        content_id: ``sha256:...`` over fields, classes, splits and the bytes of every block in order; sets that
            differ only in how blocks are spread over shards have one ``content_id``.
        licence, source: what may be done with the data, and where it is from.
    """

    name: str
    field: Field
    classes: tuple[str, ...]
    splits: Mapping[str, tuple[int, ...]]
    shards: tuple[ShardFile, ...]
    index: ShardFile
    blocks: int
    examples: int
    content_id: str
    licence: str = ""
    source: str = ""
    notes: Mapping[str, Any] = dataclass_field(default_factory=dict)

    def to_json(self) -> str:
        """The text of ``metadist.json``."""
        body = asdict(self)
        body["fields"] = {"x": body.pop("field")}
        return json.dumps({"schema": SCHEMA, **body}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Reads ``metadist.json``.

    Raises:
        DataError: if it is not a manifest, is of a newer schema, or contradicts itself.
    """
    body = decode.json_object(text, where)
    schema = str(body.pop("schema", ""))
    if schema != SCHEMA:
        if schema.startswith("metadist.shards/"):
            raise DataError(where, f"schema {schema!r}, but this metadist reads {SCHEMA!r}", "use a newer metadist")
        raise DataError(where, f"schema {schema!r} is not a shard set's", f"it must be {SCHEMA!r}")
    try:
        x = body.pop("fields")["x"]
        manifest = Manifest(
            field=Field(str(x["encoding"]), tuple(int(s) for s in x["shape"])),
            classes=tuple(str(c) for c in body.pop("classes")),
            splits={str(k): tuple(int(c) for c in v) for k, v in body.pop("splits").items()},
            shards=tuple(_file(s) for s in body.pop("shards")),
            index=_file(body.pop("index")),
            blocks=int(body.pop("blocks")),
            examples=int(body.pop("examples")),
            content_id=str(body.pop("content_id")),
            **body,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise DataError(where, f"lacks or garbles a field ({type(e).__name__}: {e})", _AGAIN) from None
    if problems := _contradictions(manifest):
        raise DataError(where, "; ".join(problems), _AGAIN)
    return manifest


def _file(entry: Mapping[str, Any]) -> ShardFile:
    return ShardFile(str(entry["name"]), int(entry["bytes"]), str(entry["sha256"]))


def _contradictions(m: Manifest) -> list[str]:
    problems = []
    if m.field.encoding not in ENCODINGS:
        problems.append(f"encoding {m.field.encoding!r} is none of {', '.join(ENCODINGS)}")
    if any(d < 1 for d in m.field.shape) or math.prod(m.field.shape) > decode.MAX_PIXELS * 4:
        problems.append(f"examples of shape {list(m.field.shape)}")
    if len(m.field.shape) not in ((0,) if m.field.encoding == "utf-8" else (2, 3)):
        problems.append(f"{m.field.encoding} examples of {len(m.field.shape)} dimensions")
    problems += [f"{f.name!r} of {f.bytes} bytes" for f in (*m.shards, m.index) if not 0 <= f.bytes < 1 << 48]
    room = sum(max(s.bytes, 0) for s in m.shards)
    if m.blocks < 0 or m.blocks > room // _LEAST_BLOCK:
        problems.append(f"{m.blocks} blocks in {room} bytes of shards")
    if not isinstance(m.notes, Mapping):
        problems.append(f"notes are a {type(m.notes).__name__}, not an object")
    if len(set(m.classes)) != len(m.classes):
        problems.append("two classes have one name")
    # A shard is a plain name in this directory: never a path, a URL or a command.
    strange = [s.name for s in m.shards if not _SHARD_NAME.fullmatch(s.name)]
    problems += [f"shard name {name!r} is not a plain file name" for name in strange]
    if m.index.name != INDEX:
        problems.append(f"index is {m.index.name!r}, not {INDEX!r}")
    owner: dict[int, str] = {}
    for split, members in m.splits.items():
        for c in members:
            if not 0 <= c < len(m.classes):
                problems.append(f"split {split!r} names class {c} of {len(m.classes)}")
            elif c in owner:
                problems.append(f"class {m.classes[c]!r} is in splits {owner[c]!r} and {split!r}")
            owner[c] = split
    return problems


def content_id(
    field: Field, classes: Iterable[str], splits: Mapping[str, Iterable[int]], blocks: Iterable[bytes]
) -> str:
    """``sha256:...`` of a set's content; ``blocks`` are the SHA-256 of every block's payload and place, in order."""
    head = {"field": asdict(field), "classes": list(classes), "splits": {k: list(v) for k, v in splits.items()}}
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for b in blocks:
        digest.update(b)
    return f"sha256:{digest.hexdigest()}"


def block_digest(klass: int, block: int, n: int, payload: bytes, offsets: Any = None) -> bytes:
    """What :func:`content_id` takes of one block."""
    digest = hashlib.sha256(json.dumps([klass, block, n, offsets]).encode())
    digest.update(hashlib.sha256(payload).digest())
    return digest.digest()


def load_manifest(path: Path) -> Manifest:
    """The manifest of the shard set in directory ``path``.

    Raises:
        DataError: if there is no such directory, or it is not a shard set.
    """
    if not path.is_dir():
        raise DataError(path, "no such shard set", "make one with `metadist data pack`, or give its directory")
    file = path / MANIFEST
    try:
        if file.stat().st_size > decode.MAX_JSON_BYTES:
            raise DataError(file, f"{file.stat().st_size} bytes of JSON, more than {decode.MAX_JSON_BYTES}")
        return parse_manifest(file.read_bytes(), str(file))
    except FileNotFoundError:
        raise DataError(path, f"not a shard set: it has no {MANIFEST}", "make one with `metadist data pack`") from None
    except OSError as e:
        raise DataError(file, f"cannot be read ({e.strerror})") from None
