"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from metadist.errors import DataError


def write_atomically(path: Path, data: bytes | str) -> None:
    """Writes ``data`` beside ``path``, syncs it and renames it in one step."""
    payload = data.encode() if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".writing", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(payload)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    sync_directory(path.parent)


def write_for_a_person(path: Path, data: bytes | str) -> None:
    """As :func:`write_atomically`, for a file that somebody has named.

    Raises:
        DataError: it cannot be written.
    """
    try:
        write_atomically(path, data)
    except OSError as e:
        raise DataError(path, f"cannot be written ({e.strerror or e})", "choose another file") from None


@contextlib.contextmanager
def whole_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """A new directory to fill, which appears as ``path`` only when the block ends without an error.

    Its files are synced before the rename; after an error nothing of it remains.

    Args:
        path: must not exist, or be an empty directory, unless it is to be replaced.
        replace: what ``path`` was gives way; it is moved aside first, so that a kill leaves the old, the new, or none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield partial
        os.chmod(partial, 0o777 & ~_umask())
        sync_files(partial)
        if replace and path.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
            os.rename(path, aside)
            os.rename(partial, path)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(path.parent)


def sweep(directory: Path) -> None:
    """Removes what a process that was killed has left half-written in ``directory``, where nobody else writes."""
    if directory.is_dir():
        for path in directory.iterdir():
            if path.name.startswith(".") and path.name.endswith((".partial", ".writing")):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def sync_files(path: Path) -> None:
    """Waits until everything in a directory is on the disk, so that a rename seen later has its content."""
    for directory, _, names in os.walk(path):
        for name in names:
            _sync(Path(directory, name))
        sync_directory(Path(directory))


def sync_directory(path: Path) -> None:
    """Makes renames within ``path`` survive a power cut."""
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
