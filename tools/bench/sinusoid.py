"""Regression on sine waves: MAML against joint training and the oracle (Finn et al. 2017, section 5.1, figures 2, 3).

Trains two learners on the same waves, both as ``configs/sinusoid_maml.yaml`` says: MAML with 10 points and one
inner step of 0.01, and the pretrained network of ``tools/examples/pretrained.py``, which learns from the support
and the query points of all tasks. Then both adapt to the same held-out waves by plain gradient steps on 5, 10
and 20 points, and the squared error is measured on other points of each wave.

MAML keeps the step size it was trained with for all steps. The baseline gets the best step size of a grid,
chosen anew for each number of points *and* of steps on validation waves, three for each test wave.
The oracle knows amplitude and phase, so its error is nought.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for tools.bench and tools.examples, from wherever this is run

import metadist as md  # noqa: E402
from metadist.config import load_config  # noqa: E402
from metadist.experiment import Experiment  # noqa: E402
from metadist.training import train  # noqa: E402
from tools.bench._tables import keep_rows  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONFIG = ROOT / "configs" / "sinusoid_maml.yaml"
BASELINE = ["algorithm.type=custom", "algorithm.import_path=tools.examples.pretrained:PretrainedOnAll"]
Tensors = dict[str, torch.Tensor]

MAML, PRETRAINED, ORACLE = "maml", "pretrained", "oracle"

POINTS = (5, 10, 20)
STEPS = 10
SHOWN_STEPS = (0, 1, 10)
MAML_RATE = 0.01
RATES = (0.001, 0.002, 0.005, 0.007, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.07, 0.1)
QUERY_POINTS = 100
QUICK_UPDATES = 8000

COLOURS = {MAML: "#2f6fde", PRETRAINED: "#c2703d"}
INK, GRID, QUIET = "#1d2433", "#e3e7ee", "#9aa3b2"
STYLES = {5: ":", 10: "-", 20: "--"}


@dataclass(frozen=True)
class Curve:
    """Squared error against the number of gradient steps, for one learner and one number of points.

    Args:
        errors: float64 ``[STEPS + 1, waves]``.
        rates: the step size of each entry, ``[STEPS + 1]``; None where no step was taken.
    """

    learner: str
    points: int
    errors: np.ndarray
    rates: tuple[float | None, ...]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each number of steps: over the waves the mean, half its 95 % interval's width, and the median."""
        half = 1.96 * self.errors.std(1, ddof=1) / math.sqrt(self.errors.shape[1])
        return [
            {
                "learner": self.learner, "support_points": self.points, "gradient_steps": k,
                "step_size": self.rates[k], "mean_squared_error": float(self.errors[k].mean()),
                "ci95": float(half[k]), "median_squared_error": float(np.median(self.errors[k])),
                "waves": self.errors.shape[1],
            }
            for k in range(len(self.errors))
        ]  # fmt: skip


# ------------------------------------------------------------------ training


def trained(name: str, updates: int | None, runs: Path, own: list[str]) -> tuple[md.Learner, dict[str, Any]]:
    """One run of the config with the learner's own words, and its summary; a finished one is taken as it is."""
    words = [f"name={name}", "tracking.wandb.mode=disabled", *own]
    words += [f"outer.steps={updates}"] if updates is not None else []
    config = load_config(CONFIG, words)
    run_dir, summary = runs / name, runs / name / "summary.json"
    if not summary.is_file():
        with contextlib.redirect_stdout(sys.stderr):  # the run's own table is progress here
            train(Experiment(config, code=True), run_dir)
    found = json.loads(summary.read_text())
    if found["version"] != config.outer.steps:
        raise SystemExit(f"sinusoid: {run_dir} was trained for {found['version']} updates, not {config.outer.steps}")
    return md.load(run_dir, allow_code=True), found


# ------------------------------------------------------------------ measuring


def waves(points: int, count: int, stream: str) -> md.EpisodeBatch:
    """The first waves of a stream: the same ones whatever the number of support points."""
    return md.SinusoidTasks(shots=points, query_shots=QUERY_POINTS).episodes(0, stream, range(count))


def descend(learner: md.Learner, support: md.Examples, rate: float) -> list[Tensors]:
    """Parameters after 0 to STEPS plain gradient steps from what was learned, whoever learned it."""
    model, objective = learner.algorithm.model, learner.algorithm.objective

    def loss(params: Tensors) -> torch.Tensor:
        return objective.loss(model(params, support.x), support.y)

    path = [learner.meta_params]
    for _ in range(STEPS):
        gradient = md.gradients(loss, path[-1])
        path.append({k: v - rate * gradient[k] for k, v in path[-1].items()})
    return path


def errors(learner: md.Learner, batch: md.EpisodeBatch, rate: float) -> np.ndarray:
    """Squared errors after 0 to STEPS gradient steps, float64 ``[STEPS + 1, waves]``; infinite where they run away."""
    model, objective, engine = learner.algorithm.model, learner.algorithm.objective, learner.algorithm.engine

    def one(support: md.Examples, query: md.Examples) -> torch.Tensor:
        return torch.stack([objective.loss(model(p, query.x), query.y) for p in descend(learner, support, rate)])

    found = engine.map_tasks(one, batch).double()  # [waves, STEPS + 1]
    return torch.nan_to_num(found, nan=torch.inf, posinf=torch.inf).numpy().T


def maml_curve(learner: md.Learner, points: int, count: int) -> Curve:
    found = errors(learner, waves(points, count, "test"), MAML_RATE)
    return Curve(MAML, points, found, (None, *[MAML_RATE] * STEPS))


def baseline_curve(learner: md.Learner, points: int, count: int) -> Curve:
    """With the step size that is best on validation waves, for each number of steps by itself."""
    validation, test = waves(points, 3 * count, "validation"), waves(points, count, "test")
    means = np.array([errors(learner, validation, rate).mean(1) for rate in RATES])  # [rates, STEPS + 1]
    best = means.argmin(0)
    by_rate = {int(i): errors(learner, test, RATES[i]) for i in set(best.tolist())}
    found = np.stack([by_rate[int(i)][k] for k, i in enumerate(best)])
    return Curve(PRETRAINED, points, found, (None, *(RATES[i] for i in best[1:])))


def oracle_curve(points: int, count: int) -> Curve:
    """Amplitude and phase are known, and the waves have no noise."""
    return Curve(ORACLE, points, np.zeros((STEPS + 1, count)), (None,) * (STEPS + 1))


def measure(learners: dict[str, md.Learner], count: int) -> list[Curve]:
    """A curve of each learner at each number of points."""
    return [
        curve
        for points in POINTS
        for curve in (
            maml_curve(learners[MAML], points, count),
            baseline_curve(learners[PRETRAINED], points, count),
            oracle_curve(points, count),
        )
    ]


# ------------------------------------------------------------------ what a person reads


def table(rows: list[dict[str, Any]]) -> str:
    """Mean squared error and its 95 % interval after SHOWN_STEPS, in Markdown."""
    lines = [
        "| learner | points | " + " | ".join(f"after {k} step{'s' * (k != 1)}" for k in SHOWN_STEPS) + " |",
        "|---|---|" + "---|" * len(SHOWN_STEPS),
    ]
    found = {(r["learner"], r["support_points"], r["gradient_steps"]): r for r in rows}
    for learner in (PRETRAINED, MAML, ORACLE):
        for points in POINTS:
            cells = [found[learner, points, k] for k in SHOWN_STEPS]
            text = " | ".join(
                "0" if learner == ORACLE else f"{c['mean_squared_error']:.3f} ± {c['ci95']:.3f}" for c in cells
            )
            lines.append(f"| {learner} | {points} | {text} |")
    return "\n".join(lines)


def draw(learners: dict[str, md.Learner], curves: list[Curve], path: Path) -> None:
    """Left: error against gradient steps. Right: two waves with what MAML makes of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.15))
    _draw_curves(_plain(figure.add_subplot(grid[:, 0])), curves)
    shown = [_plain(figure.add_subplot(grid[i, 1])) for i in range(2)]
    rates = {c.points: c.rates[STEPS] or MAML_RATE for c in curves if c.learner == PRETRAINED}
    for axes, points, wave in zip(shown, (5, 10), (0, 1), strict=True):
        _draw_wave(axes, learners, points, wave, rates[points])
    shown[0].legend(frameon=False, fontsize=7.5, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.12))
    shown[1].set_xlabel("x")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _plain(axes: Axes) -> Axes:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    return axes


def _draw_curves(axes: Axes, curves: list[Curve]) -> None:
    for curve in curves:
        if curve.learner == ORACLE:
            continue  # nought has no place on a log scale
        rows = curve.rows()
        mean, half = (np.array([r[k] for r in rows]) for k in ("mean_squared_error", "ci95"))
        steps, colour = np.arange(len(rows)), COLOURS[curve.learner]
        label = f"{'MAML' if curve.learner == MAML else 'pretrained'}, {curve.points} points"
        axes.plot(steps, mean, STYLES[curve.points], color=colour, marker="o", markersize=3.5, label=label)
        axes.fill_between(steps, np.maximum(mean - half, 1e-6), mean + half, color=colour, alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.set(xlabel="gradient steps", ylabel="mean squared error", xticks=range(STEPS + 1))
    axes.set_title(f"{curves[0].errors.shape[1]} held-out waves, mean and 95 % interval (oracle: 0)", fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _draw_wave(axes: Axes, learners: dict[str, md.Learner], points: int, wave: int, rate: float) -> None:
    """One wave with MAML before and after, and the baseline after its steps of ``rate``."""
    episode = waves(points, wave + 1, "test")[wave]
    amplitude, phase = episode.info["amplitude"], episode.info["phase"]
    x = torch.linspace(-5, 5, 200).unsqueeze(1)
    axes.plot(x, amplitude * torch.sin(x - phase), color=QUIET, linewidth=4, alpha=0.5, label="true wave (oracle)")

    def outputs(name: str, step_size: float) -> list[torch.Tensor]:
        model = learners[name].algorithm.model
        return [model(p, x).detach() for p in descend(learners[name], episode.support, step_size)]

    adapting = outputs(MAML, MAML_RATE)
    for k, style in zip(SHOWN_STEPS, (":", "--", "-"), strict=True):
        label = "MAML, before" if k == 0 else f"MAML, after {k} step{'s' * (k != 1)}"
        axes.plot(x, adapting[k], style, color=COLOURS[MAML], label=label)
    guess = outputs(PRETRAINED, rate)[STEPS]
    axes.plot(x, guess, "-", color=COLOURS[PRETRAINED], linewidth=1, label=f"pretrained, after {STEPS} steps")
    axes.plot(*episode.support, "^", color=INK, markersize=6, label="support", zorder=5)
    axes.set_title(f"{points} points: amplitude {amplitude:.1f}, phase {phase:.1f}", fontsize=9)


# ------------------------------------------------------------------ the command


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/bench/sinusoid.py --quick --json sinusoid.json --png sinusoid.png",
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_UPDATES} updates a learner: under five minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help='write {"rows": [...]} and how they came about')
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the curves and waves  [default: beside FILE]")
    parser.add_argument("--waves", type=int, default=600, help="held-out waves  [default: %(default)s]")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="keep the runs here; finished ones are taken as is")
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    found = parser.parse_args()
    if found.waves < 2:
        parser.error("--waves must be at least 2, for an interval")
    found.steps = found.steps or (QUICK_UPDATES if found.quick else None)
    if found.png is None and found.json is not None:
        found.png = found.json.with_suffix(".png")
    return found


def run(options: argparse.Namespace, runs: Path) -> None:
    own = {MAML: [], PRETRAINED: BASELINE}
    # A trial of a few steps is not worth a compiler.
    small = ["engine.compile=false"] if options.steps is not None and options.steps < 1000 else []
    learners, summaries = {}, {}
    for name, words in own.items():
        learners[name], summaries[name] = trained(name, options.steps, runs, words + small)
    started = time.perf_counter()
    curves = measure(learners, options.waves)
    rows = [row for curve in curves for row in curve.rows()]
    print(table(rows))
    if options.png:
        draw(learners, curves, options.png)
    if options.json:
        setup = {
            "date": datetime.date.today().isoformat(),
            "cpu_cores": os.cpu_count(),
            "torch": torch.__version__,
            "updates": summaries[MAML]["version"],
            "training_s": {name: round(s["wall_s"], 1) for name, s in summaries.items()},
            "measuring_s": round(time.perf_counter() - started, 1),
            "baseline_step_sizes": RATES,
        }
        keep_rows(options.json, rows, setup)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    if options.runs is not None:
        run(options, options.runs)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder))


if __name__ == "__main__":
    main()
