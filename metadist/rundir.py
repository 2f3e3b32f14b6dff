"""The run directory: what a run leaves behind, and what it is resumed from."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import secrets
import shutil
import socket
from pathlib import Path
from typing import Any

from metadist.config import Config, to_yaml, validate
from metadist.config.load import read_yaml, resolve_overrides
from metadist.errors import CheckpointError, RunDirError
from metadist.files import sweep, write_atomically
from metadist.storage import Store, open_store
from metadist.tracking.jsonl import plain

_OWNER = "run_id"


class RunDirectory:
    """Paths and small files of one run.

    Args:
        path: ``RUN_DIR``.

    ``begun`` says whether there is something to go on from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.config_file = path / "config.yaml"
        self.summary_file = path / "summary.json"
        self.begun = False

    @classmethod
    def create(cls, path: Path | None, name: str) -> RunDirectory:
        """Makes a new run directory, ``runs/NAME-TIME`` if none is named.

        Raises:
            RunDirError: it exists already, or cannot be made.
        """
        if path is None:
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            path = Path("runs") / f"{name}-{stamp}"
            n = 2
            while path.exists():
                path = Path("runs") / f"{name}-{stamp}-{n}"
                n += 1
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunDirError(
                path, "exists already", f"continue it with `metadist resume {path}`, or name another --run-dir"
            )
        run = cls(path)
        try:
            run.checkpoints.mkdir(parents=True)
        except OSError as e:
            raise RunDirError(path, f"cannot be made ({e})", "name another --run-dir") from e
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An existing run directory.

        Raises:
            RunDirError: it is missing or holds no run.
        """
        if not path.is_dir():
            raise RunDirError(path, "there is no such run directory", _known_runs())
        run = cls(path)
        run.begun = True
        if not run.config_file.is_file():
            raise RunDirError(path, "is not a run directory: it holds no config.yaml", _known_runs())
        return run

    def store(self, config: Config) -> Store:
        """Where the run's checkpoints lie."""
        return open_store(config.checkpoint.path or self.checkpoints)

    def take(self, store: Store) -> None:
        """Puts the run's id on a store that is elsewhere, as the one that may write there."""
        try:
            store.note(_OWNER, self.run_id())
        except OSError as e:
            raise CheckpointError(store, f"cannot be written ({e})", "name another checkpoint.path") from e

    def check_taken(self, store: Store, config: Config) -> None:
        """A run directory may name any place; only a run that was begun there may write to it.

        Raises:
            RunDirError: it is another run's, or nobody's.
        """
        if config.checkpoint.path is not None and store.noted(_OWNER) != self.run_id():
            raise RunDirError(
                self.path,
                f"writes its checkpoints to {config.checkpoint.path}, which is not this run's",
                "name a place of its own: `metadist resume RUN_DIR checkpoint.path=...`",
            )

    def discard(self) -> bool:
        """Removes a run that has written nothing to go on from; whether it did."""
        if self.begun:
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        return True

    def save_config(self, config: Config) -> None:
        """Keeps the resolved config."""
        header = "# The resolved config of this run: every default spelled out.\n"
        write_atomically(self.config_file, header + to_yaml(config))

    def load_config(self, overrides: tuple[str, ...] = ()) -> Config:
        """The run's config, with words ``key=value`` on top."""
        data = resolve_overrides(read_yaml(self.config_file), overrides)
        return validate(data, where=str(self.config_file))

    def save_summary(self, summary: dict[str, Any]) -> None:
        """Writes ``summary.json``; a number that is not finite, such as the interval of one episode, is null there."""
        write_atomically(self.summary_file, json.dumps(plain(summary), indent=2, allow_nan=False) + "\n")

    def run_id(self) -> str:
        """The run's own id, of Weights & Biases too; made up when it is first asked for."""
        kept = self.path / ".run_id"
        with contextlib.suppress(OSError):
            if re.fullmatch(r"[0-9a-z]{8}", found := kept.read_text()):
                return found
        made = secrets.token_hex(4)
        write_atomically(kept, made)
        return made

    def load_summary(self) -> dict[str, Any]:
        """The last summary, or nothing."""
        try:
            return dict(json.loads(self.summary_file.read_text()))
        except (OSError, ValueError):
            return {}

    def claim(self) -> None:
        """Marks the run as being written by this process.

        Raises:
            RunDirError: a living process on this machine writes it already.
        """
        lock = self.path / ".writer"
        with contextlib.suppress(OSError, ValueError):
            host, pid = lock.read_text().rsplit(" ", 1)
            if host == socket.gethostname() and int(pid) != os.getpid() and _is_alive(int(pid)):
                raise RunDirError(self.path, f"process {pid} is writing this run", "wait for it, or stop it first")
        sweep(self.path)
        sweep(self.checkpoints)
        write_atomically(lock, f"{socket.gethostname()} {os.getpid()}")

    def restarts(self) -> dict[str, int]:
        """What was last kept with :meth:`keep_restarts`; nothing, of a run that no process has written before."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found = json.loads((self.path / ".restarts").read_text())
            return {str(kind): int(count) for kind, count in found.items()}
        return {}

    def keep_restarts(self, counts: dict[str, int]) -> None:
        """Keeps how often something was lost, beside the checkpoints: those since the last one count as well."""
        if counts == self.restarts():
            return
        with contextlib.suppress(OSError):  # of a full disk others tell
            write_atomically(self.path / ".restarts", json.dumps(counts))

    def release(self) -> None:
        """Takes the mark of :meth:`claim` away."""
        (self.path / ".writer").unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _known_runs() -> str:
    known = sorted(p.parent for p in Path("runs").glob("*/config.yaml"))
    return "there are " + ", ".join(map(str, known[-5:])) if known else "start one with `metadist train CONFIG`"
