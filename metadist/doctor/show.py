"""The findings for people: a table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TextIO

from metadist.doctor.findings import Finding
from metadist.progress import counted

_STYLE = {"ok": "green", "warning": "yellow", "wrong": "bold red"}
_WIDTH = 12


class Screen:
    """Says which check is at work, and shows what is found.

    Args:
        out: where findings go.
        err: where progress goes: a line that is rewritten on a terminal, a line for each check elsewhere.
        quiet: show no findings, for instance where JSON is wanted.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None, quiet: bool = False) -> None:
        self._out, self._err, self._quiet = out or sys.stdout, err or sys.stderr, quiet
        self._live = self._err.isatty()
        self._findings: list[Finding] = []

    def checking(self, name: str) -> None:
        self._err.write(f"\r\x1b[Kchecking {name} ..." if self._live else f"checking {name}\n")
        self._err.flush()

    def found(self, finding: Finding) -> None:
        self._findings.append(finding)
        if not self._quiet and not self._out.isatty():
            self._out.write("\n".join(lines(finding)) + "\n")
            self._out.flush()

    def close(self) -> None:
        if self._live:
            self._err.write("\r\x1b[K")
            self._err.flush()
        if self._quiet:
            return
        if self._out.isatty():
            self._table()
        self._out.write(summary(self._findings) + "\n")
        self._out.flush()

    def _table(self) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("check", "", "what was found", "what is wanted, and how to mend it", box=None, pad_edge=False)
        for f in self._findings:
            advice = Text(f.wanted if f.verdict != "ok" else "")
            if f.mend and f.verdict != "ok":
                advice.append(f"\n→ {f.mend}", style="bold")
            table.add_row(Text(f.check), Text(f.verdict, style=_STYLE[f.verdict]), Text(_seen(f)), advice)
        Console(file=self._out).print(table)


def lines(finding: Finding) -> list[str]:
    """A finding as plain lines."""
    shown = [f"{finding.verdict:<7}  {finding.check:<{_WIDTH}}  {_seen(finding)}"]
    if finding.verdict != "ok":
        indent = " " * (7 + 2 + _WIDTH + 2)
        shown += [f"{indent}wanted: {finding.wanted}"] * bool(finding.wanted)
        shown += [f"{indent}mend: {finding.mend}"] * bool(finding.mend)
    return shown


def _seen(finding: Finding) -> str:
    return f"{finding.node}: {finding.found}" if finding.node else finding.found


def summary(findings: Sequence[Finding]) -> str:
    """The last line."""
    count: dict[str, Any] = {v: sum(f.verdict == v for f in findings) for v in ("wrong", "warning")}
    if not any(count.values()):
        return "nothing is wrong"
    some = counted(count["warning"], "warning")
    return f"{count['wrong']} wrong, {some}" if count["wrong"] else f"nothing is wrong, {some}"
