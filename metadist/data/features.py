"""What is known of items or users besides ratings, as features that each has or has not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metadist.data.splits import StrPath
from metadist.data.tables import read_rows
from metadist.data.tolerance import Tolerance, named, short
from metadist.errors import ConfigError, DataError

_YEAR = re.compile(r"\((1[89]\d\d|20\d\d)\b[^)]*\)")
_NONE = "(no genres listed)"  # MovieLens' way to say nothing


@dataclass(frozen=True)
class FeatureTable:
    """A table with a row for each item or user.

    Args:
        path: CSV, TSV or JSON lines.
        id_column: by what ratings name it.
        columns: where its features stand; each value is a feature. Of several columns they are named
            ``column=value``.
        separator: what parts the values within a column.
        name_column: what it is called, if that is not its id.
        year_column: a column with a year in brackets, as in ``Heat (1995)``, which has the feature ``release 1990s``.
        header: names of its columns, if its first line does not name them.
    """

    path: StrPath
    id_column: str
    columns: Sequence[str]
    separator: str = "|"
    name_column: str | None = None
    year_column: str | None = None
    header: Sequence[str] | None = None

    def features_of(self, values: Sequence[str]) -> list[str]:
        """The features of a row whose ``columns`` hold ``values``, in order."""
        found = []
        for column, value in zip(self.columns, values, strict=True):
            for part in value.split(self.separator) if self.separator else [value]:
                if part.strip() and part.strip() != _NONE:
                    found.append(part.strip() if len(self.columns) == 1 else f"{column}={part.strip()}")
        return found


def read_features(
    table: FeatureTable, ids: Sequence[str], kind: str, tolerance: Tolerance, **reading: Any
) -> tuple[list[str], dict[str, Any]]:
    """Names and features of those who are in ``ids``, in that order.

    Args:
        table: where they stand.
        ids: whose are wanted.
        kind: ``items`` or ``users``, for messages.
        tolerance: what a bad row, or none for an id, means; whoever has none has no features if it is left out.
        reading: delimiter and encoding, for :func:`~metadist.data.tables.read_rows`.

    Returns:
        Names, and ``{"names": [features], "values": [[indices of one's features], ...]}``.

    Raises:
        DataError: if the table cannot be read, or has two rows for one id or none.
    """
    if not table.columns and table.year_column is None:
        raise ConfigError(
            f"{kind}: features", f"no column of {table.path} is named", "say which with --features-column"
        )
    path, wanted = Path(table.path), set(ids)
    extra = [table.name_column or table.id_column, table.year_column or table.id_column]
    found: dict[str, tuple[int, str, list[str]]] = {}
    for line, (key, name, year, *values) in read_rows(
        path, [table.id_column, *extra, *table.columns], tolerance, header=table.header, **reading
    ):
        if key.strip() not in wanted:
            continue
        if key.strip() in found:
            told = f"{short(key.strip())} is there again; first at line {found[key.strip()][0]}"
            tolerance.bad(str(path), DataError(f"{path}:{line}", told, "keep one of the two"))
            continue
        features = table.features_of(values)
        if table.year_column and (years := _YEAR.findall(year)):
            features.append(f"release {years[-1][:3]}0s")
        found[key.strip()] = (line, name.strip(), features)
    if missing := [i for i in ids if i not in found]:
        told = f"lacks {len(missing)} of {len(ids)} {kind} that ratings name: {named(missing)}"
        if not tolerance.skips:
            raise DataError(path, told, "add them, or let them have no features with --on-bad skip")
    return _indexed([found.get(i, (0, i, [])) for i in ids])


def _indexed(rows: Sequence[tuple[int, str, list[str]]]) -> tuple[list[str], dict[str, Any]]:
    names = sorted({feature for _, _, features in rows for feature in features})
    numbers = {name: n for n, name in enumerate(names)}
    values = [sorted({numbers[f] for f in features}) for _, _, features in rows]
    return [name for _, name, _ in rows], {"names": names, "values": values}
