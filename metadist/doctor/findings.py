"""What a check says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["ok", "warning", "wrong"]
_ORDER: tuple[Verdict, ...] = ("ok", "warning", "wrong")


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    Args:
        check: its name.
        verdict: ``wrong`` is what a run would fail of or be wasted on, ``warning`` what would cost it something.
        found: what there is.
        wanted: what there should be.
        mend: what to do about it.
        node: the name of the node it is about; empty if it is about all.
    """

    check: str
    verdict: Verdict
    found: str
    wanted: str = ""
    mend: str = ""
    node: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def worst(findings: Iterable[Finding]) -> Verdict:
    """The gravest verdict; ``ok`` of none."""
    return max((f.verdict for f in findings), key=_ORDER.index, default="ok")
