"""Reads an offline run of Weights & Biases back, without an account."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metadist.errors import DataError

_MAGIC = b":W&B"
_HEADER = 7  # of the file, and of each piece of a record
_BLOCK = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def offline_runs(run_dir: Path) -> list[Path]:
    """The ``.wandb`` files under ``run_dir``, oldest first: one for each time the run was started or resumed."""
    return sorted(run_dir.glob("wandb/*run-*/*.wandb"), key=lambda p: (p.stat().st_mtime_ns, p.name))


def read_offline_run(path: Path) -> dict[str, Any]:
    """What one offline session holds.

    Args:
        path: a ``.wandb`` file, or the folder ``offline-run-...`` that holds one.

    Returns:
        ``run_id``, ``name``, ``project``, ``sweep_id``, ``tags``, ``config`` and ``summary`` (mappings), ``history`` (a
        list with the row of each log call), ``artifacts`` (``name, type, aliases, metadata`` and ``files``, from names
        to the paths they are to be sent from), ``alerts`` (``title, text``) and ``exit_code`` (None in a run that has
        not ended). A cut end, as a kill leaves it, is left out.

    Raises:
        DataError: there is no such file, it is of another kind, or bytes before its end are damaged.
    """
    from wandb.proto import wandb_internal_pb2

    found: dict[str, Any] = {"run_id": None, "name": None, "project": None, "sweep_id": None, "tags": []}
    found |= {"config": {}, "summary": {}, "history": [], "artifacts": [], "alerts": [], "exit_code": None}
    for data in _records(_file_of(path)):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.update(run_id=record.run.run_id, name=record.run.display_name, project=record.run.project)
            found.update(sweep_id=record.run.sweep_id or None, tags=list(record.run.tags))
            found["config"].update(_items(record.run.config.update))
        elif kind == "config":
            found["config"].update(_items(record.config.update))
        elif kind == "history":
            found["history"].append(_items(record.history.item))
        elif kind == "summary":
            found["summary"].update(_items(record.summary.update))
        elif kind == "artifact":
            found["artifacts"].append(_artifact(record.artifact))
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            found["artifacts"].append(_artifact(record.request.log_artifact.artifact))
        elif kind == "alert":
            found["alerts"].append({"title": record.alert.title, "text": record.alert.text})
        elif kind == "exit":
            found["exit_code"] = record.exit.exit_code
    return found


def has_ended(path: Path) -> bool:
    """Whether an offline run's file holds its last record, which the client writes some time after ``finish``.

    Reads the end of the file alone.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    with path.open("rb") as file:
        blocks = file.seek(0, os.SEEK_END) // _BLOCK
        start = max(0, blocks - 1) * _BLOCK
        file.seek(start)
        data = file.read()
    record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
    records = list(_records_of(data, 0 if start else _HEADER, path)) or [b""]
    try:
        record.ParseFromString(records[-1])
    except DecodeError:  # the end of a record whose start is in an earlier block
        return False
    return bool(record.WhichOneof("record_type") == "exit")


def _file_of(path: Path) -> Path:
    files = sorted(path.glob("*.wandb")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file():
        raise DataError(path, f"holds {len(files) if path.is_dir() else 0} .wandb files", "name one offline run")
    return files[0]


def _artifact(record: Any) -> dict[str, Any]:
    return {
        "name": record.name,
        "type": record.type,
        "aliases": list(record.aliases),
        "metadata": json.loads(record.metadata or "{}"),
        "files": {entry.path: entry.local_path for entry in record.manifest.contents},
    }


def _items(items: Any) -> dict[str, Any]:
    """Keys and JSON values as a mapping; a nested key becomes mappings in mappings."""
    found: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inside = found
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = json.loads(item.value_json)
    return found


def _records(path: Path) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, as far as they are whole."""
    data = path.read_bytes()
    if data[: len(_MAGIC)] != _MAGIC:
        raise DataError(path, "is no offline run of Weights & Biases")
    yield from _records_of(data, _HEADER, path)


def _records_of(data: bytes, at: int, path: Path) -> Iterator[bytes]:
    """The whole records from ``at`` on; ``data`` starts where a block does."""
    pieces = b""
    while True:
        if _BLOCK - at % _BLOCK < _HEADER:  # no piece starts in a block's last bytes
            at += _BLOCK - at % _BLOCK
        if at + _HEADER > len(data):
            return
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        body = data[at + _HEADER : at + _HEADER + length]
        if len(body) < length:
            return
        if checksum != zlib.crc32(body, zlib.crc32(bytes([kind]))) or not _FULL <= kind <= _LAST:
            raise DataError(path, f"is damaged at byte {at}")
        pieces = body if kind in (_FULL, _FIRST) else pieces + body
        if kind in (_FULL, _LAST):
            yield pieces
        at += _HEADER + length
