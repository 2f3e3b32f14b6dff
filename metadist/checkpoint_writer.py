"""Checkpoints written while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from metadist.checkpoint import save_checkpoint
from metadist.config.schema import CheckpointConfig
from metadist.errors import CheckpointError
from metadist.outer.gradient import Layout
from metadist.storage import Store


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time, in a thread of its own.

    A checkpoint that cannot be written is told of, and the run goes on, or with ``on_error: stop`` ends: at the next
    checkpoint, since nobody waits for one. The last one of a run is waited for, and raises.

    Args:
        store: where they lie.
        layout, config, content_id, inputs: as of :func:`metadist.checkpoint.save_checkpoint`.
        options: how many are kept, and what an error means.
        tell: told in words of one that could not be written.
    """

    def __init__(
        self,
        store: Store,
        layout: Layout,
        config: Mapping[str, Any],
        content_id: str | None,
        options: CheckpointConfig,
        tell: Callable[[str], None],
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self._store, self._layout, self._config, self._content_id = store, layout, config, content_id
        self._options, self._tell, self._inputs = options, tell, inputs
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.failed = 0

    def write(self, snapshot: Mapping[str, Any], progress: Mapping[str, Any], best: bool, last: bool) -> None:
        """Begins to write a snapshot, once the one before it is written; of the ``last`` it waits for the end.

        Raises:
            CheckpointError: the last one cannot be written; or with ``on_error: stop`` the one before this could not.
        """
        self.settle()
        writing = self._thread.submit(
            save_checkpoint, self._store, snapshot, self._layout, self._config, self._content_id, progress,
            self._options.keep, best, self._inputs,
        )  # fmt: skip
        if last:
            writing.result()
        else:
            self._writing = writing

    def settle(self) -> None:
        """Waits until what was begun is written, or has failed."""
        self._writing, writing = None, self._writing
        if writing is None:
            return
        try:
            writing.result()
        except CheckpointError as e:
            self.failed += 1
            if self._options.on_error == "stop":
                raise
            self._tell(f"a checkpoint was not written: {e}; the run goes on")

    def close(self) -> None:
        """Waits for the thread; an error of what it wrote has nobody left to hear it."""
        self._thread.shutdown(wait=True)
