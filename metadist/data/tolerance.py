"""What of a source cannot be used: refused by name, or left out and counted, up to a share."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from metadist.errors import DataError

_SHOWN, _LONGEST = 5, 60


class Tolerance:
    """What a part of a source that cannot be read means.

    Args:
        source: the source, for messages.
        kind: what its parts are, e.g. ``images``.
        on_bad: ``error``; or ``skip``: it is left out.
        most_bad: with ``skip``, the share of the parts that may be left out.
        total: how many parts there are, where that is known before they are read.

    Raises:
        DataError: if ``on_bad`` is neither.
    """

    def __init__(
        self, source: Any, kind: str, on_bad: str = "error", most_bad: float = 0.01, total: int | None = None
    ) -> None:
        if on_bad not in ("error", "skip"):
            raise DataError("on_bad", f"{on_bad!r}", "write error or skip")
        self.source, self.kind, self.skips, self.most_bad, self.total = source, kind, on_bad == "skip", most_bad, total
        self.left_out: dict[str, int] = {}
        self._why: list[str] = []

    def bad(self, of: str, error: DataError) -> None:
        """A part of ``of`` (a class, a file) cannot be read, by ``error``.

        Raises:
            DataError: ``error`` itself, or that there are too many.
        """
        if not self.skips:
            raise error
        self.left_out[of] = self.left_out.get(of, 0) + 1
        if len(self._why) < _SHOWN:
            self._why.append(str(error))
        if self.total is not None:
            self.settle(self.total)

    def settle(self, total: int) -> None:
        """Refuses more than the share of ``total`` parts."""
        most = int(self.most_bad * total)
        if sum(self.left_out.values()) > most:
            some = "".join(f"\n  {why}" for why in self._why)
            told = f"more than {most} of {total} {self.kind} cannot be read:{some}\n"
            raise DataError(self.source, told, "mend or remove them, or raise most_bad (--most-bad)")


def large_enough(counts: Mapping[str, int], least: int, skips: bool, source: Any) -> dict[str, int]:
    """The classes that have too few examples for an episode, with their numbers of examples.

    Raises:
        DataError: if there are any and they are not to be left out, if fewer than two classes are left, or if the names
            of two look the same.
    """
    if least < 1:
        raise DataError("least", f"{least} examples of a class", "it must be at least 1")
    _refuse_twins(counts, source)
    small = {name: count for name, count in counts.items() if count < least}
    if small and not skips:
        told = f"{len(small)} of {len(counts)} classes have fewer than {least} examples: {named(small)}"
        raise DataError(source, told, "an episode needs support and query: add some, or leave these out by on_bad=skip "
                                      "(--on-bad skip)")  # fmt: skip
    if len(counts) - len(small) < 2:
        kept = [name for name in counts if name not in small]
        found = f"holds one class alone, {short(kept[0])}" if kept else "holds no class"
        large = f" of {least} examples or more" if small else ""
        raise DataError(source, found + large, "an episode tells classes apart: give two or more")
    return small


def _refuse_twins(names: Iterable[str], source: Any) -> None:
    """Names that differ only in how an accent is coded, as those of different systems do, are one class for two."""
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if twin != name:
            found = f"classes {ascii(twin)} and {ascii(name)} look the same, their accents are coded in two ways"
            raise DataError(source, found, "give both one name")


def named(names: Iterable[str] | Mapping[str, int]) -> str:
    """Some of the names, shortened, with their counts if they have any, and how many more there are."""
    every = list(names)
    counts = names if isinstance(names, Mapping) else {}
    shown = [short(name) + (f" ({counts[name]})" if name in counts else "") for name in every[:_SHOWN]]
    more = len(every) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def short(name: str) -> str:
    """A name in quotes, cut if it is very long."""
    return repr(name if len(name) <= _LONGEST else name[:_LONGEST] + "…")
