"""Draws the accuracy by instance of several runs that read episodes as sequences, with the paper's figures.

Example:
  python tools/bench/by_instance.py runs/mann runs/lstm --out by_instance.png --json by_instance.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAPER = {
    "MANN, Santoro et al. 2016": {1: 0.364, 2: 0.828, 3: 0.910, 4: 0.926, 5: 0.949, 10: 0.981},
    "LSTM, Santoro et al. 2016": {1: 0.244, 2: 0.495, 3: 0.553, 4: 0.610, 5: 0.636, 10: 0.625},
}
"""Table 1: one-hot labels, five classes."""

COLOURS = ("#1f5fa8", "#c26a14", "#2c7a4b", "#7a4b9a")


def rows(run_dirs: Sequence[Path]) -> list[dict[str, Any]]:
    """Of each run its name, version, split, episodes and ``by_instance``, from its last evaluation.

    Raises:
        SystemExit: a run has none, or its learner does not read sequences.
    """
    found = []
    for run in run_dirs:
        try:
            evaluation = json.loads((run / "summary.json").read_text())["evaluation"]
            shown = evaluation["by_instance"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise SystemExit(f"{run}: has no evaluation by instance ({type(e).__name__}: {e})") from e
        found.append({"run": run.name, **{k: evaluation[k] for k in ("split", "episodes")}, "by_instance": shown})
    return found


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Lines with their intervals for the runs, dashed ones for the paper."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(7.0, 3.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for row, colour in zip(found, COLOURS, strict=False):
        shown = row["by_instance"]
        axes.errorbar(
            [int(n) for n in shown], [v["mean"] for v in shown.values()], [v["ci95"] for v in shown.values()],
            color=colour, marker="o", markersize=4, capsize=3, linewidth=2, label=row["run"],
        )  # fmt: skip
    for (name, points), colour in zip(PAPER.items(), COLOURS, strict=False):
        axes.plot(list(points), list(points.values()), "--", color=colour, linewidth=1, alpha=0.7, label=name)
    axes.axhline(0.2, color="#999999", linewidth=0.8)
    axes.text(10, 0.15, "chance", ha="right", color="#777777", fontsize=8)
    axes.set(xlabel="time that a class is shown", ylabel="accuracy", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.23))
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=Path("by_instance.png"), help="the picture")
    parser.add_argument("--json", type=Path, help="the numbers")
    options = parser.parse_args()
    found = rows(options.runs)
    draw(found, options.out)
    if options.json:
        options.json.write_text(json.dumps({"rows": found}, indent=1) + "\n")
    for row in found:
        accuracies = " ".join(f"{100 * v['mean']:.1f}" for v in row["by_instance"].values())
        print(f"{row['run']}: {accuracies} % ({row['episodes']} episodes of {row['split']})")


if __name__ == "__main__":
    main()
