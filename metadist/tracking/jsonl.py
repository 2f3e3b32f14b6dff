"""``metrics.jsonl`` and ``evaluations.jsonl``: one line a step and one an evaluation, whatever happens."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metadist.files import write_atomically
from metadist.tracking.base import RunInfo, Tracker

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a line that was cut or is no object is left out.

    Returns:
        An empty list if there is no such file.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for line in data.split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def plain(value: Any) -> Any:
    """``value`` as strict JSON can hold it: numbers that are not finite become null, unknown things their text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()  # a scalar of numpy or torch
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


class JsonlTracker(Tracker):
    """Writes ``RUN_DIR/metrics.jsonl`` and ``RUN_DIR/evaluations.jsonl``.

    A line is appended whole by one write, so a reader or a crash sees lines, never parts. A resumed run first
    drops the lines of versions it is about to compute again: afterwards every version is there exactly once. Lines for
    which the disk has no room wait until it has.
    """

    def start(self, run: RunInfo) -> None:
        self._metrics, self._evaluations = run.run_dir / METRICS, run.run_dir / EVALUATIONS
        self._late: list[tuple[Path, dict[str, Any]]] = []
        self.rewind(run.start_version)

    def rewind(self, version: int) -> None:
        self._late = [(path, line) for path, line in self._late if version_of(line) <= version]
        for path in (self._metrics, self._evaluations):
            keep_lines(path, [line for line in read_lines(path) if version_of(line) <= version])
        self._judged = {(version_of(e), e.get("split")) for e in read_lines(self._evaluations)}

    def log(self, version: int, metrics: Mapping[str, Any]) -> None:
        self._append(self._metrics, {"version": version, **metrics})

    def log_evaluation(self, version: int, result: Mapping[str, Any]) -> None:
        line, key = {"version": version, **result}, (version, result.get("split"))
        if key in self._judged:  # judged again after a resume: the newer result stands
            kept = [e for e in read_lines(self._evaluations) if (version_of(e), e.get("split")) != key]
            keep_lines(self._evaluations, [*kept, line])
        else:
            self._append(self._evaluations, line)
        self._judged.add(key)

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        self._append_late()

    def _append(self, path: Path, line: dict[str, Any]) -> None:
        self._late.append((path, line))
        self._append_late()

    def _append_late(self) -> None:
        while self._late:
            append_line(*self._late[0])
            del self._late[0]


def version_of(line: Mapping[str, Any]) -> float:
    version = line.get("version")
    return version if isinstance(version, int) else math.inf


def _encode(line: Mapping[str, Any]) -> bytes:
    return json.dumps(plain(line), allow_nan=False).encode() + b"\n"


def keep_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Leaves ``path`` with these lines, and untouched if it holds them already."""
    data = b"".join(map(_encode, lines))
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, data)


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Appends one line by one write; a full disk leaves no part of it."""
    data = _encode(line)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = os.fstat(handle).st_size
        written = os.write(handle, data)
        if written != len(data):
            os.ftruncate(handle, end)
            raise OSError(f"only {written} of {len(data)} bytes could be written to {path}")
    finally:
        os.close(handle)
