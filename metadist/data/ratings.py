"""Packing logs of ratings: a class is a user, whose ratings are in the order of time.

So an episode of one user learns from the past and is judged on the future. An example is one rating as JSON, e.g.
``{"item": 17, "rating": 4.0, "time": 964982703}``; the manifest's notes have what its numbers mean::

    kind            "ratings"
    items           name or id of each item, by its number
    item_features   {"names": [...], "values": [[numbers of an item's features], ...]}, where they are known
    user_features   the same of each user, by the number of the class
    scale           [least, most rating]
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metadist.data.features import FeatureTable, read_features
from metadist.data.manifest import Field, Manifest
from metadist.data.movielens import LICENCE, movielens
from metadist.data.pack import pack_classes
from metadist.data.samplers import Ints
from metadist.data.sources import Progress
from metadist.data.splits import FRACTIONS, StrPath, deal
from metadist.data.tables import read_rows
from metadist.data.tolerance import Tolerance, short
from metadist.data.writer import SHARD_BYTES, refuse_existing
from metadist.errors import DataError

# A user's ratings are one block, or a few in the order of time.
BLOCK_EXAMPLES = 4096


@dataclass(frozen=True)
class Columns:
    """Where a rating's parts stand. Without ``time``, a user's ratings are in the order of the rows."""

    user: str = "userId"
    item: str = "movieId"
    rating: str = "rating"
    time: str | None = "timestamp"


@dataclass
class _Log:
    """Ratings column by column, 40 bytes each; users and items by the number of their first appearance."""

    users: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    user: array[int] = field(default_factory=lambda: array("q"))
    item: array[int] = field(default_factory=lambda: array("q"))
    rating: array[float] = field(default_factory=lambda: array("d"))
    time: array[float] = field(default_factory=lambda: array("d"))
    line: array[int] = field(default_factory=lambda: array("q"))

    def add(self, user: str, item: str, rating: float, time: float, line: int) -> None:
        self.user.append(self.users.setdefault(user, len(self.users)))
        self.item.append(self.items.setdefault(item, len(self.items)))
        self.rating.append(rating)
        self.time.append(time)
        self.line.append(line)


@dataclass(frozen=True)
class _Sorted:
    """Ratings by user and time: ``rows`` of ``names[u]`` are ``edges[u]`` to ``edges[u + 1]``."""

    names: list[str]
    edges: Ints
    items: list[str]
    item: Ints
    rating: NDArray[np.float64]
    time: NDArray[np.float64] | None

    def examples(self, user: int) -> list[bytes]:
        """A user's ratings as JSON with sorted keys, the oldest first."""
        rows = slice(self.edges[user], self.edges[user + 1])
        items, ratings = self.item[rows].tolist(), self.rating[rows].tolist()
        if self.time is None:
            return [f'{{"item": {i}, "rating": {r!r}}}'.encode() for i, r in zip(items, ratings, strict=True)]
        times = [int(t) if t.is_integer() else t for t in self.time[rows].tolist()]
        columns = zip(items, ratings, times, strict=True)
        return [f'{{"item": {i}, "rating": {r!r}, "time": {t!r}}}'.encode() for i, r, t in columns]


def pack_ratings(
    source: StrPath,
    out: StrPath,
    *,
    columns: Columns = Columns(),
    items: FeatureTable | None = None,
    users: FeatureTable | None = None,
    scale: tuple[float, float] | None = None,
    least: int = 20,
    seed: int = 0,
    delimiter: str | None = None,
    header: Sequence[str] | None = None,
    encoding: str = "utf-8",
    on_bad: str = "error",
    most_bad: float = 0.01,
    name: str | None = None,
    block_examples: int = BLOCK_EXAMPLES,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Manifest:
    """Packs a table of ratings, a class for each user; users are dealt to splits at random.

    Args:
        source: CSV, TSV or JSON lines with a row for each rating; or a directory of MovieLens
            (:func:`~metadist.data.movielens.movielens`), which gives what is not given here.
        out: directory to make; it must not exist.
        columns: where user, item, rating and time stand. Times are seconds, or dates in the form of ISO 8601.
        items, users: tables of features.
        scale: least and most rating there can be; those that are there if none.
        least: ratings that a user must have; users with fewer are left out, and counted in the manifest's notes.
        seed: of the deal.
        delimiter, encoding: of all tables.
        header: names of the columns of ``source``, if its first line does not name them.
        on_bad: what a row that cannot be read, or a second rating of an item by a user, means: ``error``, or ``skip``.
        most_bad: with ``skip``, the share of the rows that may be left out.
        name, block_examples, shard_bytes, progress: as for :func:`~metadist.data.pack.pack_classes`.

    Raises:
        DataError: as :func:`~metadist.data.pack.pack_classes`, or if a table cannot be read, or no user has enough
            ratings.
    """
    refuse_existing(Path(out))
    path, licence = Path(source), ""
    reading: dict[str, Any] = {"delimiter": delimiter, "encoding": encoding}
    if path.is_dir():
        found, licence = movielens(path), LICENCE
        path, items, users, scale = (
            found["path"],
            items or found["items"],
            users or found["users"],
            scale or found["scale"],
        )
        header = header or found.get("header")
        reading |= {key: found[key] for key in reading if key in found}
    if least < 2:
        raise DataError("least", f"{least} ratings of a user", "an episode needs two, for support and query")
    if scale is not None and not scale[0] < scale[1]:
        raise DataError("scale", f"{scale[0]:g} to {scale[1]:g} is no scale", "give the least rating, then the most")
    tolerance = Tolerance(path, "rows", on_bad, most_bad)
    log = _read(path, columns, scale, tolerance, progress, {"header": header, **reading})
    rated = _sorted(log, _repeated(log, path, tolerance), least, path, timed=columns.time is not None)
    tolerance.settle(len(log.line))
    seen = [float(rated.rating.min()), float(rated.rating.max())] if scale is None else list(map(float, scale))
    notes: dict[str, Any] = {"kind": "ratings", "items": rated.items, "scale": seen}
    if items is not None:
        notes["items"], notes["item_features"] = read_features(items, rated.items, "items", tolerance, **reading)
    if users is not None:
        _, notes["user_features"] = read_features(users, rated.names, "users", tolerance, **reading)
    if few := len(log.users) - len(rated.names):
        notes["few_ratings"] = few
    if tolerance.left_out:
        notes["left_out_rows"] = tolerance.left_out
    return pack_classes(
        out,
        [(name, lambda u=u: rated.examples(u)) for u, name in enumerate(rated.names)],  # type: ignore[misc]
        deal(len(rated.names), FRACTIONS, seed),
        Field("utf-8"),
        name=name or (path.parent.name if licence else path.stem),
        licence=licence,
        source=path.name,
        notes=notes,
        block_examples=block_examples,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def _read(
    path: Path,
    columns: Columns,
    scale: tuple[float, float] | None,
    tolerance: Tolerance,
    progress: Progress | None,
    reading: dict[str, Any],
) -> _Log:
    log = _Log()
    wanted = [columns.user, columns.item, columns.rating, *([columns.time] if columns.time else [])]
    for line, (user, item, rating, *time) in read_rows(path, wanted, tolerance, progress=progress, **reading):
        where = f"{path}:{line}"
        try:
            for column, who in ((columns.user, user), (columns.item, item)):
                if not who.strip():
                    raise DataError(where, f"column {column!r} is empty", "fill it in, or leave the row out")
            value = _rating(where, columns.rating, rating, scale)
            when = _seconds(where, str(columns.time), time[0]) if time else 0.0
        except DataError as e:
            tolerance.bad(str(path), e)
            continue
        log.add(user.strip(), item.strip(), value, when, line)
    if not log.line:
        raise DataError(path, "holds no rating", "give a row for each")
    return log


def _rating(where: str, column: str, text: str, scale: tuple[float, float] | None) -> float:
    mend = "mend the row, or leave it out (--on-bad skip)"
    try:
        value = float(text)
    except ValueError:
        raise DataError(where, f"column {column!r} holds {short(text)}, not a number", mend) from None
    if not math.isfinite(value):
        raise DataError(where, f"column {column!r} holds {text.strip()}, not a finite number", mend)
    if scale is not None and not scale[0] <= value <= scale[1]:
        raise DataError(
            where, f"column {column!r} holds {value:g}, not of the scale {scale[0]:g} to {scale[1]:g}", mend
        )
    return value


def _seconds(where: str, column: str, text: str) -> float:
    """Seconds since 1970, of a number or of a date; a date without a zone is taken as UTC."""
    try:
        value = float(text)
    except ValueError:
        try:
            when = datetime.fromisoformat(text.strip())
        except ValueError:
            found = f"column {column!r} holds {short(text)}, neither seconds nor a date"
            raise DataError(where, found, "write seconds since 1970, or a date such as 2026-01-31 12:00") from None
        value = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(value):
        raise DataError(
            where, f"column {column!r} holds {text.strip()}, not a finite number", "write seconds since 1970"
        )
    return value


def _repeated(log: _Log, path: Path, tolerance: Tolerance) -> NDArray[np.bool_]:
    """Which rows rate an item that their user rated in an earlier row, bool ``[R]``."""
    user, item, line = (np.array(c, dtype=np.int64) for c in (log.user, log.item, log.line))
    order = np.lexsort((line, item, user))
    same = (np.diff(user[order]) == 0) & (np.diff(item[order]) == 0)
    again = np.zeros(len(line), dtype=bool)
    again[order[1:][same]] = True
    users, items = list(log.users), list(log.items)
    for place in np.flatnonzero(same):
        first, second = order[place], order[place + 1]
        told = f"user {short(users[user[second]])} rates item {short(items[item[second]])} again; first at line "
        tolerance.bad(str(path), DataError(f"{path}:{line[second]}", f"{told}{line[first]}", "keep one of the two"))
    return again


def _sorted(log: _Log, left_out: NDArray[np.bool_], least: int, path: Path, timed: bool) -> _Sorted:
    """Ratings of the users who have enough, by user and time; users and items in the order of their ids."""
    user, item = np.array(log.user, dtype=np.int64)[~left_out], np.array(log.item, dtype=np.int64)[~left_out]
    rating, time = np.array(log.rating)[~left_out], np.array(log.time)[~left_out]
    counts = np.bincount(user, minlength=len(log.users))
    enough = counts >= least
    if not enough.any():
        found = (
            f"no user has {least} ratings; the most is {counts.max()} by user {short(list(log.users)[counts.argmax()])}"
        )
        raise DataError(
            path, found, f"take a lower --least, at least 2{'' if counts.max() > 1 else ', and more ratings'}"
        )
    kept = enough[user]
    user, item, rating, time = user[kept], item[kept], rating[kept], time[kept]
    names, user = _renumbered(list(log.users), user)
    items, item = _renumbered(list(log.items), item)
    order = np.lexsort((time, user))  # stable: ratings of one time stay in the order of the rows
    edges = np.searchsorted(user[order], np.arange(len(names) + 1))
    return _Sorted(names, edges, items, item[order], rating[order], time[order] if timed else None)


def _renumbered(ids: Sequence[str], numbers: Ints) -> tuple[list[str], Ints]:
    """Those ids that are in use, in order (as numbers if all of them are), and what was numbered by the old order."""
    used = np.unique(numbers)
    kept = [ids[i] for i in used]
    whole = all(i.isascii() and i.isdigit() for i in kept)
    order = sorted(range(len(kept)), key=lambda i: (int(kept[i]), kept[i]) if whole else (0, kept[i]))
    new = np.empty(len(ids), dtype=np.int64)
    new[used[order]] = np.arange(len(kept))
    return [kept[i] for i in order], new[numbers]
