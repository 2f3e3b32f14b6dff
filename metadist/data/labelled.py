"""Pictures whose classes stand in a table, a row for each file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from metadist.data.sources import SourceFile
from metadist.data.splits import SPLIT_NAMES, Membership, StrPath, canonical
from metadist.data.tables import read_rows
from metadist.data.tolerance import Tolerance, named, short
from metadist.errors import DataError


@dataclass(frozen=True)
class LabelTable:
    """Which class each picture is of.

    Args:
        paths: CSV, TSV or JSON lines. Several that are named train, val and test tell the splits by their names.
        file_column: where the file is named: by its path within the source, its name, or its name without suffix.
        label_column: where its class stands.
        split_column: where the class's split stands, if the table says it.
        delimiter, encoding: as for :func:`~metadist.data.tables.read_rows`.
    """

    paths: Sequence[StrPath]
    file_column: str = "filename"
    label_column: str = "label"
    split_column: str | None = None
    delimiter: str | None = None
    encoding: str = "utf-8"


def by_table(
    table: LabelTable, files: Sequence[SourceFile], tolerance: Tolerance
) -> tuple[dict[str, list[SourceFile]], dict[str, str] | None]:
    """Pictures by class, in the order of the rows, and the split of each class if the tables tell it.

    Raises:
        DataError: if a table cannot be read, or a row names no picture, one of several of its name, or one that another
            row named.
    """
    paths = [Path(p) for p in table.paths]
    by_name = len(paths) > 1 and all(p.stem.lower() in SPLIT_NAMES for p in paths) and table.split_column is None
    columns = [table.file_column, table.label_column, *([table.split_column] if table.split_column else [])]
    reading: dict[str, Any] = {"delimiter": table.delimiter, "encoding": table.encoding}
    found, members, rows = _Files(files), Membership("split"), 0
    groups: dict[str, list[SourceFile]] = {}
    for path in paths:
        for line, (name, label, *split) in read_rows(path, columns, tolerance, **reading):
            where, rows, label = f"{path}:{line}", rows + 1, label.strip()
            try:
                if not label or (split and not split[0].strip()):
                    empty = table.label_column if not label else table.split_column
                    raise DataError(where, f"column {empty!r} is empty", "fill it in, or leave the row out")
                file = found.take(name.strip(), where)
            except DataError as e:
                tolerance.bad(str(path), e)
                continue
            groups.setdefault(label, []).append(file)
            if split or by_name:
                members.add(label, canonical(split[0].strip() if split else path.stem), where)
    tolerance.settle(rows)
    return groups, members.of if members.of else None


class _Files:
    """Pictures by what a table may call them, each to be taken once."""

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._called: dict[str, list[SourceFile]] = {}
        self._taken: dict[PurePosixPath, str] = {}
        for f in files:
            for name in {str(f.path), f.path.name, f.path.stem}:
                self._called.setdefault(name, []).append(f)

    def take(self, name: str, where: str) -> SourceFile:
        plain = name.replace("\\", "/").removeprefix("./")
        candidates = self._called.get(plain) or self._called.get(plain.rpartition("/")[2], [])
        exact = [f for f in candidates if str(f.path) == plain] or candidates
        if not exact:
            close = difflib.get_close_matches(plain, self._called, n=1)
            mend = f"did you mean {close[0]!r}?" if close else "name it by its path within the source"
            raise DataError(where, f"there is no picture {short(name)}", mend)
        if len(exact) > 1:
            told = f"{short(name)} could be {named([str(f.path) for f in exact])}"
            raise DataError(where, told, "name it by its path within the source")
        (file,) = exact
        if file.path in self._taken:
            raise DataError(where, f"picture {short(name)} was named at {self._taken[file.path]}", "name it once")
        self._taken[file.path] = where
        return file
