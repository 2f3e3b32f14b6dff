"""MovieLens as GroupLens hands it out: which files an edition has, and how to read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metadist.data.features import FeatureTable
from metadist.errors import DataError

LICENCE = "that of MovieLens (GroupLens): research use, not commercial; see the README beside the ratings"
_RATINGS = ("userId", "movieId", "rating", "timestamp")
_MOVIES = ("movieId", "title", "genres")
_USERS = ("userId", "gender", "age", "occupation", "zip")


def movielens(root: Path) -> dict[str, Any]:
    """``path`` of the ratings of a directory, and options of :func:`~metadist.data.ratings.pack_ratings` to read them.

    The editions ``latest``, ``25M`` and ``20M`` have tables with a header; ``10M`` and ``1M`` are cut at ``::`` and
    have none, and ``1M`` knows its users.

    Raises:
        DataError: if it has no ratings.
    """
    found: dict[str, Any] = {"path": root / "ratings.csv", "scale": (0.5, 5.0), "items": None, "users": None}
    movies: dict[str, Any] = {
        "id_column": "movieId",
        "columns": ("genres",),
        "name_column": "title",
        "year_column": "title",
    }
    if (root / "ratings.csv").is_file():
        if (root / "movies.csv").is_file():
            found["items"] = FeatureTable(root / "movies.csv", **movies)
        return found
    if not (root / "ratings.dat").is_file():
        raise DataError(root, "holds no ratings.csv", "give the table itself, or a directory of MovieLens")
    found |= {"path": root / "ratings.dat", "delimiter": "::", "header": _RATINGS}
    if (root / "movies.dat").is_file():
        found["items"] = FeatureTable(root / "movies.dat", **movies, header=_MOVIES)
    if (root / "users.dat").is_file():
        columns = ("gender", "age", "occupation")
        found["users"] = FeatureTable(root / "users.dat", "userId", columns, header=_USERS)
        found |= {"encoding": "latin-1", "scale": (1.0, 5.0)}
    return found
