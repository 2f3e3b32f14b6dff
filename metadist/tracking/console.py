"""Progress for whoever watches: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from metadist.progress import counted, left
from metadist.tracking.base import PARTS, RunInfo, Tracker

_SHARES = {"accuracy"}
_BAR_TIME_S = 1.0


class ConsoleTracker(Tracker):
    """Shows progress on ``err`` and, at the end, a table on ``out``.

    Args:
        out: where the table goes; None takes ``sys.stdout`` when the run starts.
        err: where progress and messages go; None takes ``sys.stderr``. A bar is drawn if it is a terminal.
        interval_s: least seconds between two progress lines where it is not.
        clock: seconds, growing.
    """

    def __init__(
        self,
        out: TextIO | None = None,
        err: TextIO | None = None,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._streams, self._interval_s, self._clock = (out, err), interval_s, clock
        self._bar: Any = None

    def start(self, run: RunInfo) -> None:
        self._run, self._version = run, run.start_version
        out, err = self._streams
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._started, self._spoke = self._clock(), float("-inf")
        self._spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        if self._err.isatty():
            self._open_bar()
        else:
            since = f" from step {run.start_version}" if run.start_version else ""
            self.message(f"{run.name}: {run.total_steps} steps{since}, {counted(run.workers, 'worker')}, {run.run_dir}")

    def log(self, version: int, metrics: Mapping[str, Any]) -> None:
        self._version = version
        for part in PARTS:
            self._spent[part] += _seconds(metrics, part)
        now = self._clock()
        if self._bar is not None:
            if now - self._spoke >= _BAR_TIME_S:
                self._bar.update(self._task, time=self._time())
                self._spoke = now
            self._bar.update(self._task, completed=version, state=self._state(metrics))
            return
        if now - self._spoke >= self._interval_s or version == self._run.total_steps:
            self._spoke = now
            told = [f"step {version}/{self._run.total_steps}", self._state(metrics), self._time(), self._left()]
            self.message("  ".join(filter(None, told)))

    def log_evaluation(self, version: int, result: Mapping[str, Any]) -> None:
        self.message(f"evaluation of step {version} on {result.get('split', 'test')}: {judged(result)}")

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._err, flush=True)

    def alert(self, title: str, text: str) -> None:
        self.message(f"warning, {title}: {text}")

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if exit_code:
            self.message(f"stopped at step {self._version} of {self._run.total_steps}; {self._run.run_dir} keeps it")
            return
        rows = result_rows(summary, self._run.run_dir)
        if self._out.isatty():
            self._print_table(rows)
        else:
            width = max(len(label) for label, _ in rows)
            print("\n".join(f"{label:<{width}}  {value}" for label, value in rows), file=self._out, flush=True)

    def _open_bar(self) -> None:
        from rich.console import Console, RenderableType
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text

        class Bar(Progress):
            """A bar with the numbers, and where the time goes, on lines below, so that each fits 80 columns."""

            def get_renderables(self) -> Iterable[RenderableType]:
                yield from super().get_renderables()
                for task in self.tasks:
                    for line in filter(None, (task.fields["state"], task.fields["time"])):
                        yield Text(line, style="dim", no_wrap=True, overflow="ellipsis")

        self._bar = Bar(
            TextColumn("{task.description}", markup=False, style="bold"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=Console(file=self._err),
            expand=True,
        )
        self._task = self._bar.add_task(
            self._run.name, total=self._run.total_steps, completed=self._run.start_version, state="", time=""
        )
        self._bar.start()

    def _state(self, metrics: Mapping[str, Any]) -> str:
        """The numbers worth watching, those that are there."""
        metric, found = self._run.metric, []
        if isinstance(metrics.get("loss"), (int, float)):
            found.append(f"loss {metrics['loss']:.3f}")
        after, before = metrics.get(metric), metrics.get(f"pre_adaptation_{metric}")
        if isinstance(after, (int, float)):
            start = f"{number(before, metric)} → " if isinstance(before, (int, float)) else ""
            found.append(f"{metric.replace('_', ' ')} {start}{number(after, metric)}")
        if isinstance(metrics.get("tasks_per_s"), (int, float)):
            found.append(f"{metrics['tasks_per_s']:.0f} tasks/s")
        found.append(counted(metrics.get("workers", self._run.workers), "worker"))
        return "  ".join(found)

    def _time(self) -> str:
        """Where the time went since this was last said; parts of less than a hundredth are left out."""
        spent, self._spent = self._spent, dict.fromkeys(PARTS, 0.0)
        whole = sum(spent.values())
        shares = {part: round(100 * s / whole) if whole > 0 else 0 for part, s in spent.items()}
        said = "  ".join(f"{part} {share} %" for part, share in shares.items() if share)
        return f"time: {said}" if said else ""

    def _left(self) -> str:
        done = self._version - self._run.start_version
        return left((self._clock() - self._started) / max(done, 1) * (self._run.total_steps - self._version))

    def _print_table(self, rows: list[tuple[str, str]]) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, title=Text(self._run.name), title_style="bold", title_justify="left")
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for label, value in rows:
            table.add_row(label, Text(value, style="bold green" if label == "after adaptation" else ""))
        Console(file=self._out).print(table)


def _seconds(metrics: Mapping[str, Any], part: str) -> float:
    found = metrics.get(f"{part}_s")
    return float(found) if isinstance(found, (int, float)) else 0.0


def number(value: Any, metric: str) -> str:
    """A result as people read it: a share in per cent, anything else with four digits."""
    if value is None:
        return "not measured"
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "not finite"
    return f"{100 * value:.1f} %" if metric in _SHARES or metric.endswith("_accuracy") else f"{value:.4g}"


def interval(result: Mapping[str, Any]) -> str:
    """Mean and half width of the 95 % interval of an evaluation."""
    metric = str(result.get("metric", "accuracy"))
    mean, half = result.get("mean"), result.get("ci95")
    if not isinstance(half, (int, float)) or not math.isfinite(half):
        return number(mean, metric)
    if number(mean, metric).endswith(" %"):
        return f"{100 * mean:.2f} ± {100 * half:.2f} %"  # type: ignore[operator]
    return f"{number(mean, metric)} ± {half:.2g}"


def judged(result: Mapping[str, Any]) -> str:
    """One evaluation in a line."""
    metric, before = str(result.get("metric", "accuracy")), result.get("pre_adaptation")
    start = "" if before is None else f"{number(before, metric)} → "
    line = f"{metric.replace('_', ' ')} {start}{interval(result)} over {result.get('episodes', '?')} episodes"
    also = result.get("also")
    for name, told in also.items() if isinstance(also, Mapping) else ():
        line += f"; {name.replace('_', ' ')} {interval({**told, 'metric': name})}"
    if isinstance(told := result.get("outsiders"), Mapping):
        line += f"; outsiders told apart with AUROC {interval({**told, 'metric': 'auroc'})}"
    shown = instances(result)
    return f"{line}; by instance {shown}" if shown else line


def instances(result: Mapping[str, Any]) -> str:
    """Accuracies in per cent when a class is shown for the first time, the second, ...; empty if there are none."""
    found = result.get("by_instance")
    if not isinstance(found, Mapping):
        return ""
    means = (v.get("mean") for v in found.values() if isinstance(v, Mapping))
    return " ".join(number(m, "accuracy").removesuffix(" %") for m in means) + " %"


def result_rows(summary: Mapping[str, Any], run_dir: Path) -> list[tuple[str, str]]:
    """The table at the end of a run, labels and values."""
    rows: list[tuple[str, str]] = []
    result = summary.get("evaluation")
    if isinstance(result, Mapping):
        metric = str(result.get("metric", "accuracy"))
        rows = [
            ("measure", metric.replace("_", " ")),
            ("before adaptation", number(result.get("pre_adaptation"), metric)),
            ("after adaptation", interval(result)),
            ("episodes", str(result.get("episodes", "?"))),
        ]
        if shown := instances(result):
            rows.append(("by instance", shown))
        if result.get("batchnorm"):
            rows.append(("BatchNorm", str(result["batchnorm"])))
    rows.append(("run directory", str(run_dir)))
    files = (("learning curve", "learning_curve.png"), ("report", "report.html"))
    return rows + [(label, str(run_dir / name)) for label, name in files if (run_dir / name).is_file()]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under the names of their columns, each column as wide as its widest entry."""
    lines = [tuple(columns), *(tuple(r) for r in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(w.ljust(n) for w, n in zip(line, widths, strict=True)).rstrip() for line in lines)
