"""How benchmarks show their rows, and keep them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", words: int = 1) -> None:
    """A table on a terminal, lines of tab-separated cells elsewhere.

    Args:
        columns: their names.
        rows: the cells of each.
        title: stands above, if there is one.
        words: leading columns that hold words; the others hold numbers.
    """
    if sys.stdout.isatty():
        table = Table(title=title or None, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i < words else "right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    if title:
        print(title)
    for line in (columns, *rows):
        print("\t".join(line))


def cells(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """A row's values in the order of ``columns``, numbers to three digits."""
    return [f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns]


def keep_rows(path: Path, rows: Sequence[dict[str, Any]], setup: dict[str, Any]) -> None:
    """Writes ``{"rows": [...], "setup": {...}}``, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows, "setup": setup}, indent=1) + "\n")
