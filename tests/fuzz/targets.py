"""What reads files of strangers, fed with altered ones: a good value or our own error, within bounds.

A target makes one case from a generator: it alters a file, reads it, and says what came of it. ``altered`` bytes whose
checksums are as they were must be refused. ``sealed`` ones, whose checksums a stranger has made fit, may be anything:
they must be read or refused, without another exception, a hang, or more memory than is stated.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from metadist.checkpoint import _BLANK, _sealed, load_checkpoint, save_checkpoint
from metadist.config import load_config, to_yaml
from metadist.data import ShardSet, pack_arrays, verify
from metadist.errors import CheckpointError, ConfigError, DataError
from metadist.outer import Layout
from metadist.rundir import RunDirectory
from metadist.storage import FolderStore
from tests.conftest import ROOT
from tests.fuzz.mutations import as_json, changed, restructured

Outcome = Literal["refused", "read", "accepted"]
"""``accepted`` is the fault: altered bytes that were taken for whole ones."""


class ShardTarget:
    """A shard set with one file altered, opened, read block by block, and verified."""

    def __init__(self, folder: Path, encoding: str = "array") -> None:
        self.whole, self.copy = folder / f"set-{encoding}", folder / f"copy-{encoding}"
        pixels = np.arange(6 * 4 * 8 * 8, dtype=np.uint8).reshape(6, 4, 8, 8)
        splits = {"train": [0, 1, 2], "validation": [3], "test": [4, 5]}
        pack_arrays(pixels, [f"k{i}" for i in range(6)], splits, self.whole, block_examples=2, shard_bytes=8000)
        self.files = {p.name: p.read_bytes() for p in sorted(self.whole.iterdir())}
        self.blocks = _blocks(self.whole)
        shutil.copytree(self.whole, self.copy)

    def __call__(self, rng: random.Random) -> Outcome:
        name = rng.choice(sorted(self.files))
        sealed = rng.random() < 0.5
        written = {name: self._altered(name, rng)}
        if sealed and name != "metadist.json":
            written["metadist.json"] = self._fitting(name, written[name])
        for each, data in written.items():
            (self.copy / each).write_bytes(data)
        try:
            return self._outcome(sealed or name == "metadist.json")
        finally:
            for each in written:
                (self.copy / each).write_bytes(self.files[each])

    def _altered(self, name: str, rng: random.Random) -> bytes:
        data = self.files[name]
        if name == "metadist.json" and rng.random() < 0.7:
            return as_json(restructured(json.loads(data), rng))
        if name == "index.npz" and rng.random() < 0.7:
            return _altered_index(data, rng)
        return changed(data, rng)

    def _fitting(self, name: str, data: bytes) -> bytes:
        """The manifest with the checksum of an altered file."""
        manifest = json.loads(self.files["metadist.json"])
        entry = {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if name == "index.npz":
            manifest["index"] = entry
        else:
            manifest["shards"] = [entry if s["name"] == name else s for s in manifest["shards"]]
        return as_json(manifest)

    def _outcome(self, may_be_read: bool) -> Outcome:
        refused = False
        try:
            blocks = _blocks(self.copy)
        except DataError:
            refused = True
        try:
            verify(self.copy)
        except DataError:
            return "refused"
        if refused:
            return "refused"
        return "read" if may_be_read or blocks == self.blocks else "accepted"


def _blocks(path: Path) -> list[bytes]:
    shards = ShardSet(path)
    try:
        shards.pool("train")
        return [shards.read(b).tobytes() for b in range(len(shards.index))]
    finally:
        shards.close()


def _altered_index(data: bytes, rng: random.Random) -> bytes:
    """An index that is a zip of arrays still, with other numbers in it."""
    import io

    with np.load(io.BytesIO(data)) as file:
        columns: dict[str, Any] = {k: file[k].copy() for k in file.files}
    name = rng.choice(sorted(columns))
    kind = rng.randrange(6)
    if kind == 0:
        del columns[name]
    elif kind == 1:
        columns[name] = columns[name][: rng.randrange(len(columns[name]))]
    elif kind == 2:
        columns[name] = columns[name].astype(rng.choice(["f8", "u1", "U8", "?", "c16", "i1", ">i8"]))
    elif kind == 3:
        columns[name] = np.zeros(rng.choice([10**6, 10**7]), np.int64)
    else:
        column = columns[name].astype(np.int64)
        column[rng.randrange(len(column))] = rng.choice([-1, 0, 1, 7, 2**31, 2**62, -(2**63), 2**63 - 1])
        columns[name] = column
    out = io.BytesIO()
    (np.savez_compressed if rng.random() < 0.5 else np.savez)(out, **columns)
    return out.getvalue()


class CheckpointTarget:
    """A checkpoint with one file altered."""

    def __init__(self, folder: Path) -> None:
        self.store = FolderStore(folder / "checkpoints")
        params = {"w": torch.arange(12.0).reshape(3, 4), "half": torch.tensor([0.5, 1.5], dtype=torch.bfloat16)}
        layout = Layout.of(params)
        vector = layout.flatten(params).numpy()
        state = {"exp_avg": vector * 2, "step": np.array(3.0, "float32")}
        snapshot = {"version": 3, "weights": vector, "outer_state": state}
        config = {"name": "run", "outer": {"lr": 0.1}}
        save_checkpoint(self.store, snapshot, layout, config, "sha256:0", {"tasks_seen": 1}, 3)
        self.path = Path(self.store.place(3))
        self.files = {p.name: p.read_bytes() for p in self.path.iterdir()}

    def __call__(self, rng: random.Random) -> Outcome:
        name, sealed = rng.choice(sorted(self.files)), rng.random() < 0.5
        written = self._sealed(name, rng) if sealed else {name: changed(self.files[name], rng)}
        for each, data in written.items():
            (self.path / each).write_bytes(data)
        try:
            load_checkpoint(self.store, 3)
            return "read" if sealed else "accepted"
        except CheckpointError:
            return "refused"
        finally:
            for each in written:
                (self.path / each).write_bytes(self.files[each])

    def _sealed(self, name: str, rng: random.Random) -> dict[str, bytes]:
        state = json.loads(self.files["state.json"])
        if name == "state.json":
            state = restructured(state, rng)
            written = {}
        else:
            data = changed(self.files[name], rng)
            state["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            written = {name: data}
        if isinstance(state, dict) and "sha256" in state:
            state["sha256"] = _BLANK
        return {**written, "state.json": _sealed(as_json(state).decode())}


class ConfigTarget:
    """The text of a config of ours, altered; as a file of a user's and as that of a run directory."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "altered.yaml"
        self.texts = [p.read_bytes() for p in sorted((ROOT / "configs").glob("*.yaml"))]
        self.texts += [to_yaml(load_config(p)).encode() for p in sorted((ROOT / "configs").glob("*.yaml"))[:4]]
        self.run = RunDirectory(folder)
        self.run.config_file = self.file

    def __call__(self, rng: random.Random) -> Outcome:
        import yaml

        text = rng.choice(self.texts)
        if rng.random() < 0.5:
            value = restructured(yaml.safe_load(text), rng)
            try:
                text = yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
            except yaml.YAMLError:
                text = as_json(value)
        else:
            text = changed(text, rng)
        self.file.write_bytes(text)
        try:
            to_yaml(self.run.load_config() if rng.random() < 0.3 else load_config(self.file))
            return "read"
        except ConfigError:
            return "refused"


TARGETS: dict[str, Callable[[Path], Callable[[random.Random], Outcome]]] = {
    "shard sets": ShardTarget,
    "checkpoints": CheckpointTarget,
    "configs": ConfigTarget,
}
