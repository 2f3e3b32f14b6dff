"""Where checkpoints lie: a folder, or any place that fsspec knows by a URL. Each version is whole or absent."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from metadist.errors import ConfigError, first_line
from metadist.files import whole_directory, write_atomically

MARK = "state.json"
"""The file that makes a folder a version."""

_LONGEST = 200
_OBJECTS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci"}


class Store(Protocol):
    """Versions, each a few files, and words that are kept beside them.

    Every method raises ``OSError`` where the place cannot be read or written.
    """

    def versions(self) -> list[int]:
        """Those that are there, from the oldest; some may be damaged."""

    def size(self, version: int, name: str) -> int:
        """Bytes of one file of a version."""

    def read(self, version: int, name: str) -> bytes:
        """One file of a version."""

    def writing(self, version: int) -> AbstractContextManager[Path]:
        """A local folder to fill, which is a version when the block ends, in place of one of the same number.

        After an error in the block nothing has changed. What lies in the folder must include :data:`MARK`.
        """

    def remove(self, version: int) -> None:
        """Lets go of a version, if it is there."""

    def note(self, name: str, text: str) -> None:
        """Keeps a word beside the versions, e.g. under ``latest`` which that is."""

    def noted(self, name: str) -> str | None:
        """The word that was kept under ``name``; None if there is none."""

    def place(self, version: int, name: str = "") -> str:
        """Where a version, or a file of it, lies: for messages."""


def open_store(where: Path | str) -> Store:
    """The store at a path or a URL.

    Raises:
        ConfigError: the URL is of a kind that fsspec does not know, or whose package is not installed.
    """
    text = str(where)
    if isinstance(where, Path) or "://" not in text:
        return FolderStore(Path(text))
    return UrlStore(text)


class FolderStore:
    """A folder of this machine: a version is written beside its place and renamed, all of it synced."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __str__(self) -> str:
        return str(self.directory)

    def versions(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.is_dir() and p.name.isdecimal())

    def size(self, version: int, name: str) -> int:
        return self._at(version, name).stat().st_size

    def read(self, version: int, name: str) -> bytes:
        return self._at(version, name).read_bytes()

    def writing(self, version: int) -> AbstractContextManager[Path]:
        return whole_directory(self._at(version), replace=True)

    def remove(self, version: int) -> None:
        shutil.rmtree(self._at(version), ignore_errors=True)

    def note(self, name: str, text: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self.directory / name, text + "\n")

    def noted(self, name: str) -> str | None:
        try:
            with (self.directory / name).open("rb") as file:
                return _word(file.read(_LONGEST))
        except FileNotFoundError:
            return None

    def place(self, version: int, name: str = "") -> str:
        return str(self._at(version, name))

    def _at(self, version: int, name: str = "") -> Path:
        return self.directory / f"{version:08d}" / name


class UrlStore:
    """A folder behind a URL, as of object storage, where nothing can be renamed.

    The mark of a version is written when the other files are there, and taken away first: without it there is no
    version.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            # Listings must be of now: another process may have written here.
            self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ValueError, ImportError) as e:
            mend = "name a folder, or a URL of a kind that fsspec knows, such as s3://bucket/run (pip install s3fs)"
            raise ConfigError("checkpoint.path", f"is {url!r}: {first_line(e)}", mend) from e

    def __str__(self) -> str:
        return self.url

    def versions(self) -> list[int]:
        def found() -> list[int]:
            self._fs.invalidate_cache()
            if not self._fs.exists(self._root):
                return []
            names = [str(p).rstrip("/").rsplit("/", 1)[-1] for p in self._fs.ls(self._root, detail=False)]
            return sorted(int(n) for n in names if n.isdecimal() and self._fs.exists(self._at(int(n), MARK)))

        return self._safely(found)

    def size(self, version: int, name: str) -> int:
        return self._safely(lambda: int(self._fs.size(self._at(version, name))))

    def read(self, version: int, name: str) -> bytes:
        return self._safely(lambda: bytes(self._fs.cat_file(self._at(version, name))))

    @contextlib.contextmanager
    def writing(self, version: int) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="metadist-") as folder:
            yield Path(folder)
            self._safely(lambda: self._put(version, Path(folder)))

    def remove(self, version: int) -> None:
        def go() -> None:
            self._unmark(version)
            if self._fs.exists(self._at(version)):
                self._fs.rm(self._at(version), recursive=True)

        self._safely(go)

    def note(self, name: str, text: str) -> None:
        def put() -> None:
            self._make(self._root)
            self._fs.pipe_file(f"{self._root}/{name}", f"{text}\n".encode())

        self._safely(put)

    def noted(self, name: str) -> str | None:
        try:
            return _word(self._safely(lambda: self._fs.cat_file(f"{self._root}/{name}", end=_LONGEST)))
        except FileNotFoundError:
            return None

    def place(self, version: int, name: str = "") -> str:
        return f"{self.url}/{version:08d}" + (f"/{name}" if name else "")

    def _at(self, version: int, name: str = "") -> str:
        return f"{self._root}/{version:08d}" + (f"/{name}" if name else "")

    def _put(self, version: int, folder: Path) -> None:
        self._make(self._at(version))
        self._unmark(version)
        for path in sorted(folder.iterdir(), key=lambda path: (path.name == MARK, path.name)):
            self._fs.put_file(str(path), self._at(version, path.name))

    def _unmark(self, version: int) -> None:
        if self._fs.exists(self._at(version, MARK)):
            self._fs.rm_file(self._at(version, MARK))

    def _make(self, folder: str) -> None:
        """A folder, where there are folders. Object storage has none, and would make a bucket instead."""
        kinds = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        if not kinds & _OBJECTS:
            self._fs.makedirs(folder, exist_ok=True)

    def _safely(self, act: Any) -> Any:
        """What storage clients raise comes in many types; here it is one."""
        try:
            return act()
        except OSError:
            raise
        except Exception as e:
            raise OSError(f"{self.url}: {type(e).__name__}: {first_line(e)}") from e


def _word(text: bytes) -> str:
    return text.decode("ascii", "replace").strip()
