"""The command line, in a process that may kill itself inside the writing of a checkpoint.

    python tests/chaos/driver.py train CONFIG ...

``CHAOS_CUT_WRITE=n`` kills it with the nth checkpoint half written.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from metadist import storage
from metadist.cli import main


def die_inside_write(nth: int) -> None:
    """Lets the ``nth`` checkpoint of this process be its end: some files whole, one cut, nothing renamed."""
    original, left = storage.FolderStore.writing, [nth]

    @contextlib.contextmanager
    def writing(self: storage.FolderStore, version: int) -> Iterator[Path]:
        left[0] -= 1
        with original(self, version) as partial:
            yield partial
            if not left[0]:
                os.truncate(partial / storage.MARK, 100)
                os.kill(os.getpid(), signal.SIGKILL)

    storage.FolderStore.writing = writing  # type: ignore[method-assign]


if __name__ == "__main__":
    if nth := int(os.environ.get("CHAOS_CUT_WRITE", "0")):
        die_inside_write(nth)
    main()
