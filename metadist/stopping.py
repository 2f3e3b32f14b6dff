"""Ctrl-C and SIGTERM: a run finishes its step, keeps it, and says how to go on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop.

    Attributes:
        signum: by what.
        run_dir: what can be resumed; None if nothing was kept.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum
        self.run_dir: Path | None = None


class StopSignals(contextlib.AbstractContextManager["StopSignals"]):
    """Turns SIGINT and SIGTERM into :class:`Interrupted`: at once, or for the first one :meth:`after_the_step`.

    Attributes:
        signum: the signal that came, if one did.
    """

    signum: int | None = None
    _patient = False

    def __enter__(self) -> StopSignals:
        self._old: dict[int, Any] = {}
        self.listen()
        return self

    def listen(self) -> None:
        """Takes the signals, also where somebody has taken them since: starting Ray does."""
        with contextlib.suppress(ValueError):  # not the main thread: leave signals to whoever owns them
            for s in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(s, self._on_signal)
                self._old.setdefault(s, before)

    def __exit__(self, *_: object) -> None:
        for s, handler in self._old.items():
            signal.signal(s, handler)

    @contextlib.contextmanager
    def after_the_step(self) -> Iterator[None]:
        """Within it the first signal is only noted; whoever runs steps looks at ``signum`` after each."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        first = self.signum is None
        self.signum = signum
        if not (first and self._patient):
            raise Interrupted(signum)
