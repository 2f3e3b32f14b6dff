"""Where a run comes from: which metadist, which commit of the user's tree. Names of code, never the code."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path


def code_version(folder: Path | None = None) -> dict[str, str]:
    """The versions of the code that runs.

    Args:
        folder: a folder of the user's tree; None: the current one.

    Returns:
        ``metadist``, the package's version, and ``commit`` where the folder is in a git checkout, ending in ``-dirty``
        where tracked files were changed since.
    """
    try:
        found = {"metadist": importlib.metadata.version("metadist")}
    except importlib.metadata.PackageNotFoundError:
        found = {"metadist": "unknown"}
    commit = _commit(folder)
    return {**found, "commit": commit} if commit else found


def _commit(folder: Path | None) -> str:
    words = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""  # no git, no checkout, or a tree too large to be looked through
    return done.stdout.strip()
