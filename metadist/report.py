"""The report of a run: one page that tells it all.

Everything is made from the files of the run directory, so a report can be written again at any time.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metadist.errors import RunDirError
from metadist.figures import (
    DARK,
    curve_png,
    draw_by_instance,
    draw_episodes,
    draw_learning_curve,
    instances_png,
    read_summary,
)
from metadist.files import write_atomically
from metadist.report_page import render_page
from metadist.tracking.base import PARTS
from metadist.tracking.console import interval, number
from metadist.tracking.jsonl import EVALUATIONS, METRICS, read_lines
from metadist.tracking.wandb import masked

__all__ = ["draw_episodes", "draw_learning_curve", "write_report"]

EPISODES = "episodes.png"
REPORT = "report.html"


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` and its pictures from the files of a run.

    The page is one file: pictures are embedded and nothing is fetched. What the run has not written yet is left out.

    Raises:
        RunDirError: there is no ``config.yaml``.
    """
    import yaml

    try:
        config_text = (run_dir / "config.yaml").read_text()
    except OSError as error:
        raise RunDirError(run_dir, "is not a run directory: it holds no config.yaml") from error
    config = yaml.safe_load(config_text) or {}
    rows, summary = read_lines(run_dir / METRICS), read_summary(run_dir)
    curves = _in_both_themes(draw_learning_curve(run_dir), lambda theme: curve_png(run_dir, theme))
    by_instance, instances = draw_by_instance(run_dir), None
    if by_instance is not None:
        shown = summary["evaluation"]["by_instance"]
        instances = _in_both_themes(by_instance, lambda theme: instances_png(shown, theme))
    grid = run_dir / EPISODES
    page = render_page(
        title=str(config.get("name", run_dir.name)),
        result=_result(summary),
        facts=_facts(summary, rows),
        curves=curves,
        instances=instances,
        episodes=_embedded(grid.read_bytes()) if grid.is_file() else None,
        steps=_steps(summary),
        time=_time_shares(rows),
        evaluations=[_evaluation_row(e) for e in read_lines(run_dir / EVALUATIONS)][-30:],
        events=_events(summary),
        config=yaml.safe_dump(masked(config), sort_keys=False, allow_unicode=True),
        sha256=summary.get("meta_params_sha256"),
    )
    write_atomically(run_dir / REPORT, page)
    return run_dir / REPORT


def _in_both_themes(light: Path, draw: Callable[[Mapping[str, str]], bytes]) -> dict[str, str]:
    """A picture for the page: as its file has it, and drawn in dark."""
    return {"light": _embedded(light.read_bytes()), "dark": _embedded(draw(DARK))}


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _result(summary: Mapping[str, Any]) -> dict[str, str] | None:
    """The table of the final evaluation."""
    evaluation = summary.get("evaluation")
    if not isinstance(evaluation, Mapping):
        return None
    metric = str(evaluation.get("metric", "accuracy"))
    return {
        "metric": metric.replace("_", " "),
        "before": number(evaluation.get("pre_adaptation"), metric),
        "after": interval(evaluation),
        "episodes": str(evaluation.get("episodes", "?")),
        "batchnorm": str(evaluation.get("batchnorm") or "none"),
    }


def _facts(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Labels and values of how much was computed, how fast and by whom."""
    version = summary.get("version", rows[-1].get("version") if rows else 0)
    facts = [("outer steps", f"{version:,}" if isinstance(version, int) else str(version))]
    if isinstance(summary.get("tasks_seen"), int):
        facts.append(("tasks seen", f"{summary['tasks_seen']:,}"))
    if isinstance(summary.get("tasks_per_s"), (int, float)):
        facts.append(("tasks per second", f"{summary['tasks_per_s']:,.1f}"))
    if isinstance(summary.get("wall_s"), (int, float)):
        minutes, seconds = divmod(round(summary["wall_s"]), 60)
        facts.append(("wall time", f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"))
    if "workers" in summary:
        facts.append(("workers", str(summary["workers"])))
    code = summary.get("code")
    if isinstance(code, Mapping):
        facts += [(str(name), str(version)) for name, version in code.items()]
    if summary.get("content_id"):
        facts.append(("data set", str(summary["content_id"])))
    return facts


def _time_shares(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """The parts of the time of all steps, in a step's order, as shares that add up to 1; parts of 0 are left out."""
    sums = [(part, sum(float(r.get(f"{part}_s") or 0.0) for r in rows)) for part in PARTS]
    total = sum(seconds for _, seconds in sums)
    return [(part, seconds / total) for part, seconds in sums if seconds > 0]


def _steps(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The adaptation curve of the final evaluation: its columns, and a row of texts for each number of inner steps."""
    evaluation = summary.get("evaluation")
    curve = evaluation.get("by_step") if isinstance(evaluation, Mapping) else None
    if not isinstance(curve, Mapping) or not curve:
        return None
    names = list(dict.fromkeys(name for found in curve.values() for name in found))
    rows = [(k, *(number(found.get(name), name) for name in names)) for k, found in curve.items()]
    return {"columns": [name.replace("_", " ") for name in names], "rows": rows}


def _evaluation_row(line: Mapping[str, Any]) -> dict[str, str]:
    metric = str(line.get("metric", "accuracy"))
    before = number(line.get("pre_adaptation"), metric)
    return {"step": str(line.get("version")), "split": str(line.get("split", "test")), "before": before,
            "after": interval(line), "episodes": str(line.get("episodes", "?"))}  # fmt: skip


def _events(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Restarts by kind of process, releases, and where else the run is kept."""
    events = []
    restarts = summary.get("restarts")
    if isinstance(restarts, Mapping):
        events += [(f"restarts, {kind}", str(count)) for kind, count in restarts.items()]
    if "releases" in summary:
        events.append(("leases released and given again", str(summary["releases"])))
    if summary.get("wandb_run"):
        events.append(("Weights & Biases run", str(summary["wandb_run"])))
    return events
