"""Progress for whoever watches: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from metadist.progress import left
from metadist.tracking.base import RunInfo, Tracker

_SHARES = {"accuracy"}


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
        if self._err.isatty():
            self._open_bar()
        else:
            since = f" from step {run.start_version}" if run.start_version else ""
            self.message(f"{run.name}: {run.total_steps} steps{since}, {run.workers} workers, {run.run_dir}")

    def log(self, version: int, metrics: Mapping[str, Any]) -> None:
        self._version = version
        if self._bar is not None:
            self._bar.update(self._task, completed=version, state=self._state(metrics))
            return
        now = self._clock()
        if now - self._spoke >= self._interval_s or version == self._run.total_steps:
            self._spoke = now
            self.message(f"step {version}/{self._run.total_steps}  {self._state(metrics)}  {self._left()}")

    def log_evaluation(self, version: int, result: Mapping[str, Any]) -> None:
        self.message(f"evaluation of step {version} on {result.get('split', 'test')}: {judged(result)}")

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._err, flush=True)

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
            """A bar with the numbers on a line below, so that both fit 80 columns."""

            def get_renderables(self) -> Iterable[RenderableType]:
                yield from super().get_renderables()
                for task in self.tasks:
                    yield Text(task.fields["state"], style="dim", no_wrap=True, overflow="ellipsis")

        self._bar = Bar(
            TextColumn("{task.description}", markup=False, style="bold"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=Console(file=self._err),
            expand=True,
        )
        self._task = self._bar.add_task(
            self._run.name, total=self._run.total_steps, completed=self._run.start_version, state=""
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
        found.append(f"{metrics.get('workers', self._run.workers)} workers")
        return "  ".join(found)

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
