"""Adapters by their ids: support sets on disk, from which any replica makes the adapted learner again.

An adapter is a small file, written in one step. So a replica that dies takes nobody's adapter along, and one that has
never seen an id finds it all the same. What is made of it is a function of the file and the run alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
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
        if self.sweep() >= self.most:
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
            with safe_open(self._path(name), "pt") as file:
                told = file.metadata() or {}
                x, y = file.get_tensor("x"), file.get_tensor("y").to(torch.int64)
            stored = Stored(x, y, json.loads(told["classes"]), float(told["expires"]))
        except (OSError, ValueError, KeyError, SafetensorError):
            return None
        return stored if stored.expires >= time.time() else None

    def holds(self, name: str) -> bool:
        """Whether an id that was given out has not been removed."""
        return bool(_ID.fullmatch(name)) and self._path(name).exists()

    def remove(self, name: str) -> bool:
        """Forgets one; False if there was none."""
        if not _ID.fullmatch(name):
            return False
        try:
            self._path(name).unlink()
        except OSError:
            return False
        return True

    def sweep(self) -> int:
        """Removes what has expired; how many are left."""
        before, left = time.time() - self.expire_s, 0
        with os.scandir(self.folder) as entries:
            for file in (e for e in entries if e.name.endswith(_SUFFIX)):
                with contextlib.suppress(FileNotFoundError):  # another replica has just removed it
                    if file.stat().st_mtime < before:
                        os.unlink(file)
                    else:
                        left += 1
        return left

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"
