"""A checkpoint as files that somebody else is to keep."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metadist.checkpoint import BEST, FILES, LATEST, best_of, load_checkpoint, versions_of
from metadist.errors import CheckpointError
from metadist.outer.gradient import sha256_of
from metadist.storage import FolderStore, Store
from metadist.tracking import Tracker


def send_checkpoints(store: Store, last: int, tracker: Tracker) -> None:
    """Hands the last and the best version to whoever keeps them beyond the run; says so if that fails."""
    try:
        best, there = best_of(store), versions_of(store)
        for version in dict.fromkeys(v for v in (best, last) if v in there):
            aliases = [name for name, v in ((LATEST, last), (BEST, best)) if v == version]
            with checkpoint_files(store, version) as files:
                tracker.log_checkpoint(version, files, aliases, described(store, version))
    except (CheckpointError, OSError) as e:
        tracker.message(f"a checkpoint was not kept elsewhere: {e}")


@contextlib.contextmanager
def checkpoint_files(store: Store, version: int) -> Iterator[dict[str, Path]]:
    """The files of a version by name; copies, as long as the context lasts, where the store is no folder.

    Raises:
        CheckpointError: they cannot be read.
    """
    if isinstance(store, FolderStore):
        yield {name: Path(store.place(version, name)) for name in FILES}
        return
    with tempfile.TemporaryDirectory(prefix="metadist-") as folder:
        copies = {name: Path(folder) / name for name in FILES}
        try:
            for name, path in copies.items():
                path.write_bytes(store.read(version, name))
        except OSError as e:
            raise CheckpointError(store.place(version), f"cannot be read ({e})") from e
        yield copies


def described(store: Store, version: int) -> dict[str, Any]:
    """What is worth knowing of a version without its tensors.

    Returns:
        ``version, meta_params_sha256, content_id, tasks_seen``.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    checkpoint = load_checkpoint(store, version)
    return {
        "version": version,
        "meta_params_sha256": sha256_of(checkpoint.meta_params),
        "content_id": checkpoint.content_id,
        "tasks_seen": checkpoint.progress.get("tasks_seen"),
    }
