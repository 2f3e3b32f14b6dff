"""Tables read row by row: CSV and TSV with a header, or JSON lines. What is wrong is told by file and line."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from metadist.data.sources import Progress
from metadist.data.tolerance import Tolerance, short
from metadist.errors import DataError, first_line

JSON_SUFFIXES = (".jsonl", ".ndjson")
MAX_VALUE_CHARS = 1 << 24
_EVERY_ROWS = 4096
_NO_TABLES = {
    b"PK\x03\x04": ("is a zip or a spreadsheet (.xlsx), not a table as text", "export it as CSV in UTF-8"),
    b"\xd0\xcf\x11\xe0": ("is a spreadsheet (.xls), not a table as text", "export it as CSV in UTF-8"),
    b"\x1f\x8b": ("is compressed by gzip", "unpack it first"),
    b"PAR1": ("is a Parquet file, not a table as text", "export it as CSV in UTF-8"),
}
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def read_rows(
    path: Path,
    columns: Sequence[str],
    tolerance: Tolerance,
    *,
    delimiter: str | None = None,
    header: Sequence[str] | None = None,
    encoding: str = "utf-8",
    progress: Progress | None = None,
) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table, each as its line in the file (from 1) and its values of ``columns``.

    A row of another length than the header, or a line that is not a JSON object with the columns, goes to
    ``tolerance``. Blank lines are passed over.

    Args:
        path: the file; ``.jsonl`` and ``.ndjson`` are JSON lines, ``.tsv`` is cut at tabs, others at commas.
        columns: names in the header, or keys of the objects.
        tolerance: what a bad row means.
        delimiter: what cuts the values of a row; of more than one character, values cannot be quoted.
        header: names of the columns of a table whose first line does not name them.
        encoding: of the text; a byte-order mark is passed over.
        progress: called with (bytes read, bytes in all) now and then.

    Raises:
        DataError: if the file cannot be read, is not text in ``encoding``, or lacks a column.
    """
    encoding = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    is_json = path.suffix.lower() in JSON_SUFFIXES
    try:
        _refuse_other_files(path)
        with path.open("rb") as raw, _decoded(raw, encoding, None if is_json else "") as text:
            if is_json:
                rows = _json_rows(path, text, columns, tolerance)
            else:
                rows = _csv_rows(path, text, columns, tolerance, delimiter or _delimiter(path), header)
            size = path.stat().st_size
            for number, row in enumerate(rows):
                yield row
                if progress and number % _EVERY_ROWS == 0:
                    progress(raw.tell(), size)
    except UnicodeError:
        raise _undecodable(path, encoding) from None
    except OSError as e:
        raise DataError(path, f"cannot be read ({e.strerror or e})", "give a CSV, TSV or .jsonl file") from None


def _decoded(raw: BinaryIO, encoding: str, newline: str | None) -> io.TextIOWrapper:
    try:
        return io.TextIOWrapper(raw, encoding, newline=newline)
    except LookupError:
        raise DataError("encoding", f"{encoding!r} is no encoding", "e.g. utf-8, latin-1, cp1252, utf-16") from None


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() in (".tsv", ".tab") else ","


def _refuse_other_files(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(4)
    for magic, (problem, mend) in _NO_TABLES.items():
        if head.startswith(magic):
            raise DataError(path, problem, mend)


def _csv_rows(
    path: Path,
    text: io.TextIOWrapper,
    columns: Sequence[str],
    tolerance: Tolerance,
    delimiter: str,
    header: Sequence[str] | None,
) -> Iterator[tuple[int, list[str]]]:
    lines = _cut(path, text, delimiter)
    if not header:
        _, header = next(lines, (1, []))
        if not header:
            raise DataError(path, "is empty", f"its first line must name the columns, {', '.join(columns)} among them")
    places = _places(path, header, columns, delimiter)
    for number, values in lines:
        if len(values) == len(header):
            yield number, [values[i] for i in places]
        elif values:
            found = f"{len(values)} values, but the header names {len(header)} columns"
            mend = f"put a value that holds {delimiter!r} or a line's end in double quotes"
            tolerance.bad(str(path), DataError(f"{path}:{number}", found, mend))


def _cut(path: Path, text: io.TextIOWrapper, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table, each with the line on which it begins."""
    if len(delimiter) > 1:
        for number, line in enumerate(text, 1):
            yield number, line.rstrip("\r\n").split(delimiter) if line.strip() else []
        return
    if delimiter in '"\r\n':
        raise DataError("delimiter", f"{delimiter!r} cannot cut values", "e.g. , or ; or tab")
    csv.field_size_limit(MAX_VALUE_CHARS)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    first = 1
    try:
        for values in reader:
            yield first, values
            first = reader.line_num + 1
    except csv.Error as e:
        mend = "close the quote, and double each one within a value"
        raise DataError(f"{path}:{first}", f"the row that begins here cannot be read ({e})", mend) from None


def _places(path: Path, header: Sequence[str], columns: Sequence[str], delimiter: str) -> list[int]:
    """Where each column stands in the header."""
    names = [name.strip() for name in header]
    for column in columns:
        if names.count(column) == 1:
            continue
        if column in names:
            raise DataError(f"{path}:1", f"two columns are named {column!r}", "rename one")
        has = ", ".join(short(name) for name in names)
        close = difflib.get_close_matches(column, names, n=1)
        mend = f"did you mean {close[0]!r}?" if close else "its first line must name the columns, or --header"
        if len(names) == 1 and not close:
            mend += f"; if they are not cut at {delimiter!r}, say at what with --delimiter"
        raise DataError(f"{path}:1", f"there is no column {column!r} in the header, which has {has}", mend)
    return [names.index(column) for column in columns]


def _json_rows(
    path: Path, text: io.TextIOWrapper, columns: Sequence[str], tolerance: Tolerance
) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield number, _values(where, line, columns)
        except DataError as e:
            tolerance.bad(str(path), e)


def _values(where: str, line: str, columns: Sequence[str]) -> list[str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise DataError(where, f"is not JSON ({first_line(e)})", "write one object a line") from None
    if not isinstance(row, dict):
        raise DataError(where, f"is a JSON {type(row).__name__}, not an object", 'write {"column": value, ...}')
    values = []
    for column in columns:
        if column not in row:
            close = difflib.get_close_matches(column, row, n=1)
            mend = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(map(short, row)) or 'no keys'}"
            raise DataError(where, f"there is no {column!r} in the object", mend)
        values.append(_text(where, column, row[column]))
    return values


def _text(where: str, column: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(where, f"{column!r} holds {json.dumps(value)[:40]}", "it must hold a text or a number")
    found = str(value)
    try:
        found.encode()
    except UnicodeEncodeError:
        raise DataError(where, f"{column!r} holds half a character (a lone surrogate)", "write it anew") from None
    return found


def _undecodable(path: Path, encoding: str) -> DataError:
    """Names the line and the byte that are not text in ``encoding``."""
    name = encoding.removesuffix("-sig")
    mend = f"save the file as UTF-8, or say what it is with --encoding{' (latin-1, cp1252)' if name == 'utf-8' else ''}"
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode(name)
            except UnicodeError as e:
                if number == 1 and line.startswith(_UTF_16):
                    return DataError(path, f"is UTF-16, not {name}", "say so with --encoding utf-16")
                at = getattr(e, "start", 0)
                return DataError(f"{path}:{number}", f"byte {line[at]:#04x} at place {at + 1} is not {name}", mend)
    return DataError(path, f"is not text in {name}", mend)
