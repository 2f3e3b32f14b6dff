"""Packing tables of texts: a class is a label, an example a text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metadist.data.manifest import Field, Manifest
from metadist.data.pack import BLOCK_EXAMPLES, pack_classes
from metadist.data.sources import Progress
from metadist.data.splits import Membership, StrPath, choose, numbered
from metadist.data.spool import Spool
from metadist.data.tables import read_rows
from metadist.data.tolerance import Tolerance, large_enough
from metadist.data.writer import SHARD_BYTES, refuse_existing
from metadist.errors import ConfigError, DataError


def pack_csv(
    source: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    text_column: str,
    label_column: str,
    group_column: str | None = None,
    split_column: str | None = None,
    splits: StrPath | None = None,
    seed: int = 0,
    delimiter: str | None = None,
    header: Sequence[str] | None = None,
    encoding: str = "utf-8",
    least: int = 2,
    on_bad: str = "error",
    most_bad: float = 0.01,
    name: str | None = None,
    licence: str = "",
    block_examples: int = BLOCK_EXAMPLES,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Manifest:
    """Packs one or more tables of texts with labels.

    Labels are stripped of blanks around them, texts are kept as they are. Classes are in the order of their names,
    examples in that of the rows. Splits are dealt at random unless a column or a list says otherwise.

    Args:
        source: CSV, TSV or JSON-lines files (:func:`~metadist.data.tables.read_rows`).
        out: directory to make; it must not exist.
        text_column, label_column: where text and label stand.
        group_column: where a class's group stands, e.g. its domain: a group is in one split as a whole.
        split_column: where a class's split stands.
        splits: JSON file of lists, ``{"train": [...], ...}``, of classes, or of groups if there is a group column;
            classes that it does not name are left out.
        seed: of the deal.
        delimiter, header, encoding: of the tables, as for :func:`~metadist.data.tables.read_rows`.
        least: examples that a class must have.
        on_bad: what a row that cannot be read, or a class of fewer than ``least``, means: ``error``; or ``skip``: it
            is left out, and counted in the manifest's notes.
        most_bad: with ``skip``, the share of the rows that may be left out.
        name, licence, block_examples, shard_bytes, progress: as for :func:`~metadist.data.pack.pack_classes`.

    Raises:
        DataError: as :func:`~metadist.data.pack.pack_classes`, or if a table cannot be read, a class is too small or
            in two groups or splits.
        ConfigError: if splits are told in two ways.
    """
    if split_column is not None and (splits is not None or group_column is not None):
        raise ConfigError("split_column", "tells the splits, and so does a list or a group", "give one of them")
    refuse_existing(Path(out))
    paths = [Path(source)] if isinstance(source, (str, os.PathLike)) else [Path(p) for p in source]
    member_column = group_column or split_column
    columns = [text_column, label_column, *([member_column] if member_column else [])]
    members = Membership("group" if group_column else "split")
    reading = {"delimiter": delimiter, "header": header, "encoding": encoding}
    tolerance = Tolerance(", ".join(map(str, paths)), "rows", on_bad, most_bad)
    with Spool() as spool:
        rows = 0
        for path in paths:
            table = read_rows(path, columns, tolerance, progress=progress, **reading)  # type: ignore[arg-type]
            rows += _keep(path, columns, table, spool, members, tolerance)
        tolerance.settle(rows)
        return pack_texts(
            out,
            spool.counts,
            spool.of,
            lambda names: choose(
                names,
                groups=members.of if group_column else None,
                told=members.of if split_column else None,
                listed=splits,
                seed=seed,
            ),
            where=tolerance.source,
            source=", ".join(path.name for path in paths),
            least=least,
            skips=tolerance.skips,
            notes={"left_out_rows": tolerance.left_out} if tolerance.left_out else {},
            name=name or paths[0].stem,
            licence=licence,
            block_examples=block_examples,
            shard_bytes=shard_bytes,
            progress=progress,
        )


def _keep(
    path: Path,
    columns: Sequence[str],
    table: Iterable[tuple[int, list[str]]],
    spool: Spool,
    members: Membership,
    tolerance: Tolerance,
) -> int:
    """Takes the rows of a table; how many there were."""
    rows = 0
    for line, values in table:
        rows += 1
        try:
            label, text, *more = _checked(f"{path}:{line}", columns, values)
        except DataError as e:
            tolerance.bad(str(path), e)
            continue
        spool.add(label, text.encode())
        if more:
            members.add(label, more[0], f"{path}:{line}")
    return rows


def _checked(where: str, columns: Sequence[str], values: Sequence[str]) -> list[str]:
    """Label, text, and group or split if there is one; only the text may have blanks around it."""
    for column, value in zip(columns, values, strict=True):
        if not value.strip():
            raise DataError(where, f"column {column!r} is empty", "fill it in, or leave the row out (--on-bad skip)")
    text, label, *more = values
    return [label.strip(), text, *(value.strip() for value in more)]


def pack_texts(
    out: StrPath,
    counts: Mapping[str, int],
    texts_of: Callable[[str], list[bytes]],
    splits_of: Callable[[list[str]], Mapping[str, Sequence[str]]],
    *,
    where: str,
    least: int,
    skips: bool,
    notes: Mapping[str, Any],
    **options: Any,
) -> Manifest:
    """Packs texts by class: those of enough examples that a split names.

    Args:
        out: directory to make.
        counts: classes and how many texts each has.
        texts_of: the texts of a class, UTF-8.
        splits_of: from the classes that are large enough to the classes of each split.
        where: where they come from, for messages.
        least: texts that a class must have.
        skips: leave out classes that have fewer, instead of refusing them.
        notes: for the manifest.
        options: for :func:`~metadist.data.pack.pack_classes`.
    """
    small = large_enough(counts, least, skips, where)
    large = sorted(set(counts) - set(small))
    splits = splits_of(large)
    names = sorted({name for members in splits.values() for name in members})
    told: dict[str, Any] = {"kind": "text", **notes}
    if small:
        told["too_small"] = small
    if len(names) < len(large):
        told["in_no_split"] = len(large) - len(names)

    def texts(klass: str) -> list[bytes]:
        found = texts_of(klass)
        if twice := len(found) - len(set(found)):
            told["repeated"] = told.get("repeated", 0) + twice
        return found

    return pack_classes(
        out,
        [(name, lambda name=name: texts(name)) for name in names],  # type: ignore[misc]
        numbered(splits, names),
        Field("utf-8"),
        notes=lambda: told,
        **options,
    )
