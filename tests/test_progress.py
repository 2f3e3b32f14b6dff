"""Long commands say how far they are, and short ones nothing."""

from __future__ import annotations

import io
import itertools

import pytest

from metadist import progress
from metadist.progress import Progress, tracked


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(err: io.StringIO, seconds: float, steps: int = 10) -> str:
    """What is said of so many steps of so many seconds each."""
    ticks = (seconds * i for i in itertools.count())
    with Progress("packing", err, lambda: next(ticks)) as say:
        for done in range(1, steps + 1):
            say(done, steps)
    return err.getvalue()


def test_a_line_every_five_seconds_and_one_at_the_end() -> None:
    lines = told(io.StringIO(), 2.0).splitlines()
    assert lines == [
        "packing 3 of 10, 0:14 left", "packing 6 of 10, 0:08 left", "packing 9 of 10, 0:02 left", "packing 10 of 10",
    ]  # fmt: skip


def test_nothing_is_said_of_what_is_soon_done() -> None:
    assert told(io.StringIO(), 0.1) == ""


def test_a_terminal_has_one_line_that_changes() -> None:
    written = told(Terminal(), 2.0)
    assert written.count("\n") == 1 and written.endswith("packing 10 of 10\n") and written.count("\r") == 10


def test_items_are_handed_on_in_order(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_S", 0.0)
    assert list(tracked("abc", "reading", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines()[-1] == "reading 3 of 3"
