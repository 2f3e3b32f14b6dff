"""Tar files read strictly.

Readers of tar archives end without a word at a header they cannot read, and at the end of a file that was cut
between two members. Here both are errors.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from metadist.errors import DataError

_AGAIN = "pack or copy the set again"


@dataclass(frozen=True)
class Member:
    """One file of a tar: its name, where its bytes begin, and how many there are."""

    name: str
    offset: int
    size: int


def scan(path: Path) -> list[Member]:
    """All members of a tar, in order.

    Raises:
        DataError: if the file is missing, cut anywhere, has a header that cannot be read, anything after its
            end mark, or a member that is not a regular file.
    """
    try:
        with path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            members = list(tar)
            _check_end(raw, tar.offset, path)
    except FileNotFoundError:
        raise DataError(path, "is missing", _AGAIN) from None
    except (tarfile.TarError, EOFError, ValueError) as e:
        raise DataError(path, f"is cut or damaged ({e})", _AGAIN) from None
    for m in members:
        if not m.isfile():
            raise DataError(path, f"member {m.name!r} is not a regular file", _AGAIN)
    return [Member(m.name, m.offset_data, m.size) for m in members]


def _check_end(raw: BinaryIO, offset: int, path: Path) -> None:
    """An archive ends in at least two blocks of zeros, and nothing else follows its last member."""
    raw.seek(offset)
    rest = raw.read(1 << 20)
    if rest.strip(b"\0"):
        raise DataError(path, f"the header at byte {offset} cannot be read", _AGAIN)
    if len(rest) < 1024:
        raise DataError(path, f"is cut at byte {offset + len(rest)}: its end mark is missing", _AGAIN)
