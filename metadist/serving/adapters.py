"""Adapters by their ids: support sets on disk, from which any replica makes the adapted learner again.

An adapter is a small file, written in one step. So a replica that dies takes nobody's adapter along, and one that has
never seen an id finds it all the same. What is made of it is a function of the file and the run alone.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from metadist.files import write_atomically

_ID = re.compile(r"[A-Za-z0-9_-]{22}")
_SUFFIX = ".adapter"


@dataclass(frozen=True)
class Stored:
    """A support set.

    Args:
        x: inputs ``[S, ...]``.
        y: class numbers ``[S]``.
        classes: their names.
        expires: when it is no longer answered for, in seconds since 1970.
    """

    x: Tensor
    y: Tensor
    classes: list[str]
    expires: float


class AdapterStore:
    """Support sets in a folder that all replicas see.

    Args:
        folder: made if it is not there.
        most: adapters at a time.
        expire_s: seconds for which one is kept.
    """

    def __init__(self, folder: Path, most: int, expire_s: float) -> None:
        self.folder, self.most, self.expire_s = folder, most, expire_s
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, x: Tensor, y: Tensor, classes: list[str]) -> tuple[str, float] | None:
        """Keeps a support set; its id, which cannot be guessed, and when it expires. None if there is no room."""
        self.sweep()
        if sum(1 for _ in self._files()) >= self.most:
            return None
        name, expires = secrets.token_urlsafe(16), time.time() + self.expire_s
        told = {"classes": json.dumps(classes), "expires": repr(expires)}
        write_atomically(self._path(name), save({"x": x.contiguous(), "y": y.contiguous()}, metadata=told))
        return name, expires

    def get(self, name: str) -> Stored | None:
        """The support set of an id; None if there is none, or it has expired."""
        if not _ID.fullmatch(name):
            return None
        try:
            data = self._path(name).read_bytes()
            size = int.from_bytes(data[:8], "little")
            told = json.loads(data[8 : 8 + size])["__metadata__"]
            tensors = load(data)
        except (OSError, ValueError, KeyError, SafetensorError):
            return None
        expires = float(told["expires"])
        if expires < time.time():
            return None
        return Stored(tensors["x"], tensors["y"].to(torch.int64), json.loads(told["classes"]), expires)

    def remove(self, name: str) -> bool:
        """Forgets one; False if there was none."""
        if not _ID.fullmatch(name):
            return False
        try:
            self._path(name).unlink()
        except OSError:
            return False
        return True

    def sweep(self) -> None:
        """Removes what has expired."""
        before = time.time() - self.expire_s
        for file in self._files():
            if file.stat().st_mtime < before:
                self.remove(file.name.removesuffix(_SUFFIX))

    def _files(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.folder) as entries:
            yield from (e for e in entries if e.name.endswith(_SUFFIX))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"
