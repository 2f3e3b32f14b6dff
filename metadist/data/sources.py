"""Images as their owners keep them: folders, or zips read without unpacking."""

from __future__ import annotations

import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from metadist.errors import DataError

Progress = Callable[[int, int], None]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_FILE_BYTES = 1 << 28


@dataclass(frozen=True)
class SourceFile:
    """A file of a folder or a zip: its path within, a name for messages, and how to read it."""

    path: PurePosixPath
    where: str
    read: Callable[[], bytes]


def _hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def folder_files(root: Path) -> list[SourceFile]:
    """Every file below ``root`` that is not hidden, by path; paths are relative to ``root``. Links are followed.

    Raises:
        DataError: if ``root`` is not a directory, one cannot be read, or a link leads back to where it is.
    """
    if not root.is_dir():
        raise DataError(root, "no such directory", "give the directory that holds the images")
    files = []
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        inner, names, here = _entries(folder, above)
        waiting += [(sub, above | {here}) for sub in inner]
        for full in names:
            files.append(SourceFile(PurePosixPath(full.relative_to(root).as_posix()), str(full), file_reader(full)))
    return sorted(files, key=lambda f: f.path.parts)


def _entries(folder: Path, above: frozenset[tuple[int, int]]) -> tuple[list[Path], list[Path], tuple[int, int]]:
    """Folders and files of a folder that are not hidden, and what the folder is known by: device and inode.

    Raises:
        DataError: if it cannot be read, or is one of those ``above`` it, to which a link leads back.
    """
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise DataError(folder, "is a link back to a folder above it", "remove the link")
        with os.scandir(folder) as entries:
            shown = [Path(e.path) for e in entries if not _hidden(PurePosixPath(e.name))]
    except OSError as e:
        raise DataError(folder, f"cannot be read ({e.strerror})", "make it readable, or move it away") from None
    folders = [path for path in shown if path.is_dir()]
    return folders, [path for path in shown if path not in set(folders)], here


def file_reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise DataError(path, f"{size:,} bytes, more than {MAX_FILE_BYTES:,}", "make it smaller, or remove it")
            return path.read_bytes()
        except OSError as e:
            raise DataError(path, f"cannot be read ({e.strerror})", "make it readable, or remove it") from None

    return read


@contextmanager
def zip_files(path: Path) -> Iterator[list[SourceFile]]:
    """Every file of a zip that is not hidden, by path; they can be read within the ``with`` block.

    Raises:
        DataError: if it is not a zip, or holds a name twice.
    """
    try:
        archive = zipfile.ZipFile(path)
    except Exception as e:  # OSError, BadZipFile, NotImplementedError, UnicodeDecodeError and more
        raise DataError(path, f"cannot be read as a zip ({e})", "make or download it again") from None
    with archive:
        files, seen = [], set()
        for entry in archive.infolist():
            name = PurePosixPath(entry.filename)
            if entry.is_dir() or _hidden(name):
                continue
            if name in seen:
                raise DataError(f"{path}:{name}", "is in the zip twice", "keep one of the two")
            seen.add(name)
            files.append(SourceFile(name, f"{path}:{name}", _zip_reader(archive, entry, path)))
        yield sorted(files, key=lambda f: f.path.parts)


def _zip_reader(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        if entry.file_size > MAX_FILE_BYTES:
            found = f"{entry.file_size:,} bytes, more than {MAX_FILE_BYTES:,}"
            raise DataError(f"{path}:{entry.filename}", found, "make it smaller, or leave it out of the zip")
        try:
            return archive.read(entry)
        except Exception as e:  # zlib.error, BadZipFile, NotImplementedError, RuntimeError (encrypted), OSError
            raise DataError(f"{path}:{entry.filename}", f"cannot be read ({e})", "make or download it again") from None

    return read


@contextmanager
def downloaded(urls: Sequence[str], progress: Progress | None = None) -> Iterator[Path]:
    """A temporary directory with the files of ``urls``, gone after the ``with`` block.

    Args:
        urls: https addresses; a file is kept under the last part of its address.
        progress: called with (bytes so far, bytes in all or 0) for each file.

    Raises:
        DataError: if one cannot be fetched, e.g. without a network.
    """
    with tempfile.TemporaryDirectory(prefix="metadist-") as folder:
        for url in urls:
            if not url.startswith("https://"):
                raise DataError(url, "only https addresses are downloaded")
            try:
                _fetch(url, Path(folder, url.rsplit("/", 1)[-1]), progress)
            except (OSError, urllib.error.URLError, ValueError) as e:
                reason = getattr(e, "reason", None) or e
                mend = "check the network, or download it yourself and give its directory with --source"
                raise DataError(url, f"cannot be downloaded ({reason})", mend) from None
        yield Path(folder)


def _fetch(url: str, to: Path, progress: Progress | None) -> None:
    with urllib.request.urlopen(url, timeout=60) as answer, to.open("wb") as file:
        total = int(answer.headers.get("Content-Length") or 0)
        if progress is None:
            shutil.copyfileobj(answer, file)
        while progress is not None and (chunk := answer.read(1 << 18)):
            file.write(chunk)
            progress(file.tell(), total)
        if total and file.tell() != total:
            raise OSError(f"the connection ended after {file.tell()} bytes of {total}")
