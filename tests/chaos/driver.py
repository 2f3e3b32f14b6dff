"""The command line, in a process that may kill itself inside the writing of a checkpoint.

    python tests/chaos/driver.py train CONFIG ...

``CHAOS_CUT_WRITE=n`` kills it with the nth checkpoint half written.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from metadist import files, storage
from metadist.cli import main


def die_inside_write(nth: int) -> None:
    """Lets the ``nth`` checkpoint of this process be its end: some files whole, one cut, nothing renamed."""
    original, left = storage.FolderStore.write, [nth]

    def write(self: storage.FolderStore, version: int, contents: Mapping[str, bytes]) -> None:
        left[0] -= 1
        if left[0]:
            original(self, version, contents)
            return
        with files.whole_directory(self.directory / f"{version:08d}", replace=True) as partial:
            names = list(contents)
            for name in names[:-1]:
                (partial / name).write_bytes(contents[name])
            Path(partial / names[-1]).write_bytes(contents[names[-1]][:100])
            os.kill(os.getpid(), signal.SIGKILL)

    storage.FolderStore.write = write  # type: ignore[method-assign]


if __name__ == "__main__":
    if nth := int(os.environ.get("CHAOS_CUT_WRITE", "0")):
        die_inside_write(nth)
    main()
