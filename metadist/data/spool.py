"""Examples of many classes that arrive mixed, kept on the disk until each class is asked for."""

from __future__ import annotations

import os
import tempfile
from array import array
from types import TracebackType

from metadist.errors import DataError


class Spool:
    """Bytes by class in a temporary file: memory grows by 16 bytes an example, whatever its length."""

    def __init__(self) -> None:
        try:
            self._file = tempfile.TemporaryFile(prefix="metadist-")  # noqa: SIM115 (closed by __exit__)
        except OSError as e:
            raise _unwritable(e) from None
        self._places: dict[str, array[int]] = {}
        self._end = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    @property
    def counts(self) -> dict[str, int]:
        """How many examples each class has."""
        return {klass: len(places) // 2 for klass, places in self._places.items()}

    def add(self, klass: str, example: bytes) -> None:
        """Takes one example.

        Raises:
            DataError: if there is no room for it.
        """
        try:
            self._file.write(example)
        except OSError as e:
            raise _unwritable(e) from None
        self._places.setdefault(klass, array("Q")).extend((self._end, len(example)))
        self._end += len(example)

    def of(self, klass: str) -> list[bytes]:
        """All examples of a class, in the order they came."""
        try:
            self._file.flush()
        except OSError as e:
            raise _unwritable(e) from None
        file, places = self._file.fileno(), self._places[klass]
        return [os.pread(file, size, start) for start, size in zip(places[::2], places[1::2], strict=True)]


def _unwritable(e: OSError) -> DataError:
    where = tempfile.tempdir or "the folder of temporary files"
    mend = "free some space there, or set TMPDIR to another folder"
    return DataError(where, f"cannot be written ({e.strerror or e})", mend)
