"""Checkpoints of committed versions: safetensors and JSON, whole or absent, checked when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from metadist.errors import CheckpointError
from metadist.outer.gradient import Layout, sha256_of
from metadist.storage import MARK, Store

SCHEMA = "metadist.checkpoint/1"
_TENSOR_FILES = ("meta_params.safetensors", "outer_state.safetensors")
FILES = (*_TENSOR_FILES, MARK)
"""What a version consists of."""
_VECTOR = "meta_params_vector"
_KEPT = (torch.float32, torch.float64, torch.int64)
_MOST_STATE = 1 << 28
_BLANK = "0" * 64
LATEST, BEST = "latest", "best"


class _File(BaseModel):
    bytes: int
    sha256: str


class _State(BaseModel):
    """What ``state.json`` holds."""

    version: int
    layout: list[str]
    files: dict[str, _File]
    content_id: str | None
    inputs: dict[str, Any] | None = None
    progress: dict[str, Any]
    config: dict[str, Any]

    @field_validator("files")
    @classmethod
    def _both_files(cls, files: dict[str, _File]) -> dict[str, _File]:
        if set(files) != set(_TENSOR_FILES):
            raise ValueError(f"names {sorted(files)}, wanted {list(_TENSOR_FILES)}")
        return files


@dataclass(frozen=True)
class Checkpoint:
    """One committed version.

    Args:
        version: meta-updates made.
        meta_params: what is learned, by name.
        snapshot: what the parameter server restores itself from.
        config: the resolved config as plain values.
        content_id: of the data it was trained on, if the source has one.
        progress: totals of the run so far, e.g. ``tasks_seen``.
        inputs: what its tasks look like, as of :class:`metadist.inputs.Inputs`; None of checkpoints before there were.
    """

    version: int
    meta_params: dict[str, Tensor]
    snapshot: dict[str, Any]
    config: dict[str, Any]
    content_id: str | None
    progress: dict[str, Any]
    inputs: dict[str, Any] | None = None


def save_checkpoint(
    store: Store,
    snapshot: Mapping[str, Any],
    layout: Layout,
    config: Mapping[str, Any],
    content_id: str | None,
    progress: Mapping[str, Any],
    keep: int,
    best: bool = False,
    inputs: Mapping[str, Any] | None = None,
) -> None:
    """Writes a server snapshot as a version, points ``latest`` at it, removes the oldest.

    Args:
        store: where to.
        snapshot: of :meth:`metadist.server.ParameterServer.snapshot`.
        layout: of its weights.
        config, content_id, progress, inputs: see :class:`Checkpoint`.
        keep: how many to keep, besides the best.
        best: whether it is the best so far; ``best`` points at it then.

    Raises:
        CheckpointError: it cannot be written (a full disk, say); the ones before it are untouched.
    """
    version = snapshot["version"]
    vector = _tensor(snapshot["weights"])
    meta_params = layout.unflatten(vector)
    outer = {k: _tensor(v) for k, v in snapshot["outer_state"].items()}
    if any(d != layout.dtype for d in layout.dtypes):
        # The named tensors are rounded copies: keep the vector the optimizer works on as well.
        outer[_VECTOR] = vector
    state: dict[str, Any] = {
        "schema": SCHEMA,
        "sha256": _BLANK,
        "version": version,
        "meta_params_sha256": sha256_of(meta_params),
        "layout": list(layout.names),
        "content_id": content_id,
        "inputs": None if inputs is None else dict(inputs),
        "progress": dict(progress),
        "config": dict(config),
    }
    try:
        with store.writing(version) as folder:
            files = dict(zip(_TENSOR_FILES, (meta_params, outer), strict=True))
            state["files"] = {name: _saved(tensors, folder / name) for name, tensors in files.items()}
            (folder / MARK).write_bytes(_sealed(json.dumps(state, indent=1)))
        store.note(LATEST, f"{version:08d}")
        if best:
            store.note(BEST, f"{version:08d}")
        # Later versions are damaged ones that the run went back from: they must not crowd out the whole ones.
        spared = best_of(store)
        old = [v for v in store.versions() if v <= version][:-keep]
        for v in old:
            if v != spared:
                store.remove(v)
    except OSError as e:
        raise CheckpointError(
            store.place(version), f"cannot be written ({e})", "the checkpoints before it are whole"
        ) from e


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor that shares an array's memory if that can be written to."""
    return torch.from_numpy(np.require(array, requirements="W"))


def _saved(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Writes tensors to a file without holding them twice; its size and its checksum.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(dict(tensors), path)
    except SafetensorError as e:
        raise OSError(str(e)) from e
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def load_checkpoint(store: Store, version: int) -> Checkpoint:
    """Reads and checks one version.

    Raises:
        CheckpointError: it is missing, cut, altered, or of a newer schema.
    """
    state = _read_state(store, version)
    tensors = {}
    for name in _TENSOR_FILES:
        listed, where = state.files[name], store.place(version, name)
        try:
            there = store.size(version, name)
            if there != listed.bytes:
                raise CheckpointError(where, f"holds {there} bytes, {listed.bytes} were written")
            data = store.read(version, name)
        except OSError as e:
            raise CheckpointError(where, f"cannot be read ({e})") from e
        if hashlib.sha256(data).hexdigest() != listed.sha256:
            raise CheckpointError(where, "is not what was written: its checksum differs")
        try:
            tensors[name] = load_tensors(data)
        except SafetensorError as e:
            raise CheckpointError(where, f"is not a safetensors file ({e})") from e
    named, outer = tensors[_TENSOR_FILES[0]], tensors[_TENSOR_FILES[1]]
    if sorted(named) != sorted(state.layout) or not named:
        raise CheckpointError(store.place(version), "its tensors are not the ones its state.json lists")
    meta_params = {name: named[name] for name in state.layout}
    try:
        layout = Layout.of(meta_params)
    except ValueError as e:
        raise CheckpointError(store.place(version, _TENSOR_FILES[0]), str(e)) from e
    vector = outer.pop(_VECTOR, None)
    if vector is None:
        vector = layout.flatten(meta_params)
    for name, tensor in {_VECTOR: vector, **outer}.items():
        if tensor.shape not in ((layout.numel,), ()) or tensor.dtype not in _KEPT:
            held = f"{tensor.dtype} {list(tensor.shape)}"
            raise CheckpointError(
                store.place(version, _TENSOR_FILES[1]), f"its {name} is {held}, wanted [{layout.numel}]"
            )
    snapshot = {
        "version": version,
        "weights": vector.numpy(),
        "outer_state": {k: v.numpy() for k, v in outer.items()},
    }
    return Checkpoint(version, meta_params, snapshot, state.config, state.content_id, state.progress, state.inputs)


def best_of(store: Store) -> int | None:
    """The version that was the best of the evaluations during training, if there is one."""
    noted = store.noted(BEST)
    return int(noted) if noted is not None and noted.isdecimal() else None


def versions_of(store: Store) -> list[int]:
    """The versions that a store holds, from the oldest; some may be damaged.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return store.versions()
    except OSError as e:
        raise CheckpointError(store, f"cannot be read ({e})") from e


def newest_whole_checkpoint(store: Store) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that is whole, and what was wrong with the ones passed over.

    Raises:
        CheckpointError: there is none.
    """
    faults: list[str] = []
    for version in reversed(versions_of(store)):
        try:
            return load_checkpoint(store, version), faults
        except CheckpointError as e:
            faults.append(str(e))
    raise CheckpointError(store, "holds no whole checkpoint" + "".join(f"\n  {f}" for f in faults))


def check_fits(checkpoint: Checkpoint, layout: Layout, content_id: str | None, where: object) -> None:
    """Refuses a checkpoint of another model or another data set, naming what differs.

    Raises:
        CheckpointError: with the first few differences.
    """
    theirs = {k: (tuple(v.shape), v.dtype) for k, v in checkpoint.meta_params.items()}
    ours = dict(zip(layout.names, zip(layout.shapes, layout.dtypes, strict=True), strict=True))
    faults = [f"{k} is not a parameter of this model" for k in theirs if k not in ours]
    faults += [f"{k} is missing" for k in ours if k not in theirs]
    faults += [
        f"{k} is {list(theirs[k][0])} {theirs[k][1]}, wanted {list(ours[k][0])} {ours[k][1]}"
        for k in ours
        if k in theirs and theirs[k] != ours[k]
    ]
    if not faults and tuple(theirs) != layout.names:
        faults = ["its parameters are the same but come in another order"]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise CheckpointError(
            where,
            "is of another model: " + "; ".join(faults[:3]) + more,
            "resume it with the model it was trained with",
        )
    if content_id is not None and checkpoint.content_id is not None and content_id != checkpoint.content_id:
        raise CheckpointError(
            where,
            f"was trained on data {checkpoint.content_id[:12]}, but tasks now name {content_id[:12]}",
            "point tasks.path at the shard set it was trained on",
        )


def _read_state(store: Store, version: int) -> _State:
    where = store.place(version, MARK)
    try:
        if store.size(version, MARK) > _MOST_STATE:
            raise CheckpointError(where, f"holds more than {_MOST_STATE >> 20} MB, which no run writes")
        data = store.read(version, MARK)
        state = json.loads(data.decode())
    except OSError as e:
        raise CheckpointError(where, f"cannot be read ({e})") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(where, f"is not JSON ({e})") from e
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        held = state.get("schema") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            where, f"is of schema {held!r}, this version reads {SCHEMA}", "use the metadist that wrote it"
        )
    if state.get("sha256") != _seal(data.replace(str(state.get("sha256")).encode(), _BLANK.encode(), 1)):
        raise CheckpointError(where, "is not what was written: its checksum differs")
    try:
        checked = _State.model_validate(state, strict=True)
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(where, f"its {field} will not do: {first['msg'].lower()}") from e
    if checked.version != version:
        raise CheckpointError(where, f"is of version {checked.version}, but lies where {version} belongs")
    return checked


def _sealed(text: str) -> bytes:
    """The text of a state with its own checksum, over the text with zeros in the checksum's place, filled in."""
    blank = text.encode()
    return blank.replace(_BLANK.encode(), _seal(blank).encode(), 1)


def _seal(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
