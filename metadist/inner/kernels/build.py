"""The package's few lines of C++: built when they are first needed and kept for the next process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-fast-math", "-shared", "-fPIC")

SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
"""Ends a function's name, by the numbers it takes."""


@functools.cache
def function(source: Path, name: str, device: torch.device, dtype: torch.dtype, arguments: Sequence[type[Any]]) -> Any:
    """The C++ function ``name`` for numbers of a kind; None where tensor operations must do.

    Args:
        source: the file it stands in.
        name: without the suffix of its numbers.
        device, dtype: of the tensors it is to take.
        arguments: their types, a tuple of ctypes.
    """
    if device.type != "cpu" or dtype not in SUFFIX or (library := load(source)) is None:
        return None
    found = getattr(library, f"{name}_{SUFFIX[dtype]}")
    found.argtypes, found.restype = list(arguments), None
    return found


@functools.cache
def load(source: Path) -> ctypes.CDLL | None:
    """The shared library of one C++ file; None, once said to the log, where it cannot be built.

    It is kept under ``$METADIST_CACHE`` (``~/.cache/metadist`` by default) by the digest of its source and processor.
    """
    try:
        return ctypes.CDLL(str(_built(source)))
    except Exception as e:
        log.info("%s is not compiled, its plain form is used: %s", source.name, e)
        return None


def _compiler() -> str:
    """``$CXX``, or what there is. Inductor's own choice would do, but takes a second and more to ask for."""
    named = os.environ.get("CXX")
    found = [named] if named else [name for name in ("g++", "clang++", "c++") if shutil.which(name)]
    if not found:
        raise FileNotFoundError("there is no C++ compiler: none of g++, clang++ and c++, and CXX is not set")
    return found[0]


def _built(source: Path) -> Path:
    compiler = _compiler()
    texts = [f.read_bytes() for f in (source, *sorted(source.parent.glob("*.h")))]
    name = hashlib.sha256(b"\0".join([*texts, compiler.encode(), " ".join(_FLAGS).encode(), _processor()])).hexdigest()
    cache = Path(os.environ.get("METADIST_CACHE", Path.home() / ".cache" / "metadist"))
    library = cache / f"{source.stem}-{name[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Beside and renamed: another process may build it at the same time.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / library.name
            subprocess.run(
                [compiler, *_FLAGS, str(source), "-o", str(made)], check=True, capture_output=True, timeout=120
            )
            made.replace(library)
    return library


def _processor() -> bytes:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "".join(sorted({x for x in lines if x.startswith(("flags", "Features", "model name"))})).encode()
