"""Pictures of a run: the learning curve, and a few episodes with what the learner made of them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metadist.files import write_atomically, write_for_a_person
from metadist.tracking.jsonl import EVALUATIONS, METRICS, read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from metadist.episode import EpisodeBatch

CURVE, INSTANCES = "learning_curve.png", "accuracy_by_instance.png"

LIGHT = {"paper": "#ffffff", "ink": "#1d2433", "grid": "#e3e7ee", "before": "#c2703d", "after": "#2f6fde"}
DARK = {"paper": "#171b24", "ink": "#d8deea", "grid": "#2c3342", "before": "#e0965f", "after": "#6ea2ff"}
_MARKERS = {"validation": "o", "test": "D"}
_SHOWN_EPISODES, _SHOWN_PICTURES, _SHOWN_SHOTS = 4, 10, 5
_METHODS = ("#2f6fde", "#c2703d", "#b0479c", "#2c9c69", "#9aa3b2")
_RIGHT, _WRONG, _QUIET = "#2e9e5b", "#d64545", "#9aa3b2"


def draw_learning_curve(run_dir: Path) -> Path:
    """Draws ``learning_curve.png``: the query loss and the task's metric, before and after adaptation, by step.

    Thin lines are steps, thick ones their running mean; points are evaluations with 95 % intervals.
    """
    path = run_dir / CURVE
    write_atomically(path, curve_png(run_dir, LIGHT))
    return path


def draw_by_instance(run_dir: Path) -> Path | None:
    """Draws ``accuracy_by_instance.png``: the accuracy when a class is shown for the first time, the second, ...

    Returns:
        Its path, or None if the run's evaluation has no such accuracies.
    """
    evaluation = read_summary(run_dir).get("evaluation")
    shown = evaluation.get("by_instance") if isinstance(evaluation, Mapping) else None
    if not isinstance(shown, Mapping) or not shown:
        return None
    write_atomically(run_dir / INSTANCES, instances_png(shown, LIGHT))
    return run_dir / INSTANCES


def draw_episodes(
    batch: EpisodeBatch,
    path: Path,
    predictions_before: Tensor | None = None,
    predictions_after: Tensor | None = None,
) -> Path | None:
    """Draws a few episodes, with what the learner made of them.

    Args:
        batch: pictures ``[T, S, 1 or 3, H, W]`` with class numbers, or functions ``[T, S, 1]`` with values of the same
            shape.
        path: the PNG to write.
        predictions_before: of the query before adaptation: outputs ``[T, Q, ways]``, class numbers ``[T, Q]``, or
            values ``[T, Q, 1]``.
        predictions_after: the same after adaptation.

    Returns:
        ``path``, or None if the episodes are neither pictures nor functions of one number.
    """
    figure = _drawn(batch, predictions_before, predictions_after)
    if figure is None:
        return None
    write_atomically(path, _png(figure))
    return path


def draw_by_shots(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws what each method makes of each number of shots, a panel for each data set, with 95 % intervals.

    Args:
        rows: of :func:`metadist.crossing.crossed`.
        path: the PNG to write.

    Raises:
        DataError: it cannot be written.
    """
    sets = list(dict.fromkeys((row["data"], row["name"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shots = sorted({int(row["shots"]) for row in rows})
    figure = _figure(4.2 * len(sets), 3.6, LIGHT)
    for panel, (data, name) in enumerate(sets):
        axes = figure.add_subplot(1, len(sets), panel + 1)
        for place, method in enumerate(methods):
            own = [row for row in rows if (row["data"], row["method"]) == (data, method)]
            at = [row["shots"] * 1.03 ** (place - (len(methods) - 1) / 2) for row in own]  # side by side
            values, ci = ([row[k] for row in own] for k in ("mean", "ci95"))
            colour, width = _METHODS[place % len(_METHODS)], 1.2 if place else 2.2
            axes.errorbar(at, values, ci, label=method, marker="o", ms=3, capsize=2, color=colour, lw=width)
        _style(axes, LIGHT)
        axes.set_xscale("log")
        axes.set_xticks(shots, [str(k) for k in shots])
        axes.minorticks_off()
        axes.set(title=name, xlabel="shots", ylabel=str(rows[0]["metric"]).replace("_", " ") if panel == 0 else "")
        if panel == 0:
            axes.legend(frameon=False, fontsize=8)
    write_for_a_person(path, _png(figure))


def episode_pictures(batch: EpisodeBatch, before: Tensor, after: Tensor) -> list[bytes]:
    """Each episode as a picture of its own (PNG), as :func:`draw_episodes` draws several; none of other kinds."""
    pictures = []
    for n, episode in enumerate(batch):
        figure = _drawn(type(batch).stack([episode]), before[n : n + 1], after[n : n + 1])
        if figure is not None:
            pictures.append(_png(figure))
    return pictures


def _drawn(batch: EpisodeBatch, predictions_before: Tensor | None, predictions_after: Tensor | None) -> Figure | None:
    x, y = batch.support
    if x.dim() == 5 and x.shape[2] in (1, 3) and y.dim() == 2 and not y.is_floating_point():
        return _picture_grid(batch, _classes(predictions_before), _classes(predictions_after))
    if x.dim() == 3 and x.shape[-1] == 1 and y.shape == x.shape and x.is_floating_point() and y.is_floating_point():
        return _function_plots(batch, predictions_before, predictions_after)
    return None


# ------------------------------------------------------------------ the learning curve


def metric_of(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """The task's metric: as the evaluation names it, else the one that the steps give before adaptation too."""
    evaluation = summary.get("evaluation")
    if isinstance(evaluation, Mapping) and evaluation.get("metric"):
        return str(evaluation["metric"])
    names = [k for row in rows[:1] for k in row if k != "loss" and f"pre_adaptation_{k}" in row]
    return names[0] if names else "accuracy"


def curve_png(run_dir: Path, theme: Mapping[str, str]) -> bytes:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    rows, evaluations = read_lines(run_dir / METRICS), read_lines(run_dir / EVALUATIONS)
    metric = metric_of(rows, read_summary(run_dir))
    share = metric.endswith("accuracy")
    panels = [metric, "loss"] if share else [metric if any(metric in r for r in rows) else "loss"]
    figure = _figure(7.0, 3.3 * len(panels), theme)
    for n, name in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, n + 1)
        _style(axes, theme)
        _draw_series(axes, rows, f"pre_adaptation_{name}", theme["before"], "before adaptation")
        _draw_series(axes, rows, name, theme["after"], "after adaptation")
        if name == metric:
            _draw_evaluations(axes, [e for e in evaluations if e.get("metric", metric) == metric], theme)
        axes.set_ylabel(("query " if name == "loss" else "") + name.replace("_", " "))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if share and name == metric:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_ylim(0, 1.02)
        elif not share and all(v > 0 for line in axes.lines for v in np.ravel(line.get_ydata()) if math.isfinite(v)):
            axes.set_yscale("log")
        if not axes.lines:
            axes.text(0.5, 0.5, "no steps yet", ha="center", color=theme["ink"], transform=axes.transAxes)
    figure.axes[-1].set_xlabel("outer step")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, labelcolor=theme["ink"])
    return _png(figure)


def _draw_series(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, colour: str, label: str) -> None:
    points = [(r["version"], r[name]) for r in rows if isinstance(r.get(name), (int, float)) and "version" in r]
    if not points:
        return
    steps, values = np.array(points, dtype=np.float64).T
    axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
    axes.plot(steps, running_mean(values, max(1, len(values) // 25)), color=colour, linewidth=2.0, label=label)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of up to ``window`` values before and after each one, float64 ``[n]``.

    Near the start, where a curve is steepest, no more are taken after than there are before.
    """
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    reach = np.minimum(window, at)
    first, last = at - reach, np.minimum(at + reach + 1, len(values))
    return np.asarray((total[last] - total[first]) / (last - first))


def _draw_evaluations(axes: Axes, evaluations: Sequence[Mapping[str, Any]], theme: Mapping[str, str]) -> None:
    for split in sorted({str(e.get("split", "test")) for e in evaluations}):
        mine = [e for e in evaluations if str(e.get("split", "test")) == split and e.get("mean") is not None]
        if mine:
            axes.errorbar(
                [e["version"] for e in mine],
                [e["mean"] for e in mine],
                yerr=[e.get("ci95") or 0.0 for e in mine],
                fmt=_MARKERS.get(split, "s"),
                markersize=5.5,
                markerfacecolor=theme["paper"],
                capsize=3,
                color=theme["ink"],
                label=f"evaluation, {split}",
                zorder=5,
                clip_on=False,
            )


def instances_png(shown: Mapping[str, Any], theme: Mapping[str, str]) -> bytes:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = _figure(7.0, 3.3, theme)
    axes = figure.add_subplot()
    _style(axes, theme)
    axes.errorbar(
        [int(n) for n in shown],
        [v["mean"] for v in shown.values()],
        yerr=[v.get("ci95") or 0.0 for v in shown.values()],
        color=theme["after"],
        marker="o",
        capsize=3,
        linewidth=2.0,
    )
    axes.set(xlabel="time that a class is shown", ylabel="accuracy", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return _png(figure)


# ------------------------------------------------------------------ episodes


def _classes(predictions: Tensor | None) -> np.ndarray | None:
    """Class numbers ``[T, Q]`` of outputs or class numbers."""
    if predictions is None:
        return None
    found = predictions.detach().cpu()
    return np.asarray(found.argmax(dim=-1) if found.dim() == 3 else found)


def _picture_grid(batch: EpisodeBatch, before: np.ndarray | None, after: np.ndarray | None) -> Figure:
    support_y, query_y = batch.support.y.cpu().numpy(), batch.query.y.cpu().numpy()
    tasks = min(len(batch), _SHOWN_EPISODES)
    classes = min(int(support_y[0].max()) + 1, _SHOWN_PICTURES)
    shots = min(_SHOWN_SHOTS, int(np.bincount(support_y[0]).max()))
    queries = _spread(query_y[0], _SHOWN_PICTURES)
    row, first_query = shots + 0.85, classes + 0.6
    wide = first_query + len(queries)
    figure = _figure(wide * 0.62, (tasks * row + 0.7) * 0.62, LIGHT)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(-0.05, wide + 0.05), ylim=(tasks * row, -0.7), aspect="equal")
    axes.axis("off")
    for left, width, text in ((0, classes, "support"), (first_query, len(queries), _query_title(before, after))):
        axes.text(left + width / 2, -0.25, text, ha="center", color=LIGHT["ink"], fontsize=9)
    for t in range(tasks):
        top = t * row
        for c in range(classes):
            for k, i in enumerate(np.flatnonzero(support_y[t] == c)[:shots]):
                _show(axes, batch.support.x[t, int(i)], c, top + k)
            _caption(axes, c, top + shots, _label(c), LIGHT["ink"])
        for n, i in enumerate(queries):
            read = [int(p[t, i]) for p in (before, after) if p is not None]
            _show(axes, batch.query.x[t, int(i)], first_query + n, top)
            _frame(axes, first_query + n, top, int(query_y[t, i]), read)
    return figure


def _frame(axes: Axes, left: float, top: float, true: int, read: list[int]) -> None:
    """A query picture's frame, green if it was read right in the end, and under it what it was read as."""
    from matplotlib.patches import Rectangle

    right = bool(read) and read[-1] == true
    colour = _QUIET if not read else _RIGHT if right else _WRONG
    text = " → ".join(map(_label, read)) + ("" if right else f" ({_label(true)})")
    axes.add_patch(Rectangle((left + 0.04, top + 0.04), 0.92, 0.92, fill=False, edgecolor=colour, linewidth=2.2))
    _caption(axes, left, top + 1, text.strip(), colour)


def _caption(axes: Axes, left: float, top: float, text: str, colour: str) -> None:
    axes.text(left + 0.5, top + 0.28, text, ha="center", va="center", color=colour, fontsize=8)


def _spread(labels: np.ndarray, most: int) -> np.ndarray:
    """Up to ``most`` places in ``labels``, as many of every class as of any other."""
    rank = np.array([int((labels[:i] == label).sum()) for i, label in enumerate(labels)])
    return np.sort(np.lexsort((labels, rank))[:most])


def _query_title(before: np.ndarray | None, after: np.ndarray | None) -> str:
    if before is not None and after is not None:
        return "query: read as, before → after (true if wrong)"
    return "query (true)" if before is None and after is None else "query: read as (true if wrong)"


def _label(c: int) -> str:
    return chr(ord("A") + c) if c < 26 else str(c + 1)


def _show(axes: Axes, picture: Tensor, left: float, top: float) -> None:
    """One picture in the unit square at ``left``, ``top``, on a light ground."""
    pixels = picture.detach().cpu().float().numpy()
    low, high = min(0.0, float(pixels.min())), max(1.0, float(pixels.max()))
    pixels = (pixels - low) / (high - low)
    if len(pixels) == 1:
        pixels = np.repeat(1 - pixels if np.median(pixels) < 0.5 else pixels, 3, axis=0)
    extent = (left + 0.07, left + 0.93, top + 0.93, top + 0.07)
    axes.imshow(pixels.transpose(1, 2, 0), extent=extent, interpolation="nearest")


def _function_plots(batch: EpisodeBatch, before: Tensor | None, after: Tensor | None) -> Figure:
    tasks = min(len(batch), _SHOWN_EPISODES)
    columns = min(2, tasks)
    lines = -(-tasks // columns)
    figure = _figure(3.9 * columns, 2.7 * lines + 0.3, LIGHT)
    for t in range(tasks):
        axes = figure.add_subplot(lines, columns, t + 1)
        _style(axes, LIGHT)
        x = batch.query.x[t, :, 0].detach().cpu().numpy()
        order = np.argsort(x)
        series = (
            (batch.query.y, _QUIET, "true", "-"),
            (before, LIGHT["before"], "before adaptation", "--"),
            (after, LIGHT["after"], "after adaptation", "-"),
        )
        for values, colour, label, style in series:
            if values is not None:
                y = values[t].detach().cpu().reshape(-1).numpy()
                axes.plot(x[order], y[order], style, color=colour, label=label, marker=".", markersize=4)
        points = (part[t, :, 0].detach().cpu().numpy() for part in batch.support)
        axes.plot(*points, "^", color=LIGHT["ink"], markersize=6, label="support", zorder=5)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


# ------------------------------------------------------------------ figures


def _figure(width: float, height: float, theme: Mapping[str, str]) -> Figure:
    """A figure that leaves pyplot's global state, and so the user's, alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor=theme["paper"], layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes, theme: Mapping[str, str]) -> None:
    axes.set_facecolor(theme["paper"])
    axes.grid(color=theme["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme["ink"], length=0)
    axes.xaxis.label.set_color(theme["ink"])
    axes.yaxis.label.set_color(theme["ink"])
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme["grid"])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def read_summary(run_dir: Path) -> dict[str, Any]:
    try:
        found = json.loads((run_dir / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
