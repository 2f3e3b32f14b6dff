"""What updates that do not wait cost in learning, and what they gain in time: at equal tasks, and at equal time.

Real runs of second-order MAML on sine waves, over Ray, with eight workers of which one is five times slower: for each
microbatch of four tasks a worker waits 50 ms, the slow one 250 ms, and then computes it. Sides:

``waits``: every update waits for its whole meta-batch, the default; what is late is leased again.
``max_staleness 4``: an update is made as soon as enough gradients have come, none of them more than four versions old;
with ``inverse`` one that lags by s versions counts for 1 / (1 + s).
``quorum 7/8``: an update leaves out the last eighth of its meta-batch.
``bfloat16``: as ``waits``, with gradients that travel in half the bytes, each with the last one's rounding error.

All runs of a seed begin with the same weights and are judged on the same waves. Equal tasks: after the last update.
Equal time: after as many seconds as the fastest side took for all of its updates, evaluations aside. Means over seeds;
beside them how far a side is from ``waits`` of the same seed, with its standard error over the seeds.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for tools.bench, from wherever this is run

from metadist.tracking.jsonl import EVALUATIONS, METRICS, read_lines  # noqa: E402
from tools.bench._tables import cells, keep_rows, show_table  # noqa: E402

SIDES: dict[str, dict[str, Any]] = {
    "waits": {},
    "max_staleness 4": {"max_staleness": 4},
    "max_staleness 4, inverse": {"max_staleness": 4, "staleness_weighting": "inverse"},
    "quorum 7/8": {"quorum": 0.875},
    "bfloat16": {"wire": "bfloat16"},
}
WORKERS, TASKS, SLOW_BY, WAIT_S = 8, 4, 5.0, 0.05
WAVES = 600
COLUMNS = (
    "side", "ms_per_update", "error", "error_less_waits", "standard_error", "error_at_time", "at_time_less_waits",
    "at_time_standard_error", "mean_staleness", "most_stale", "left_out_percent",
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """What one run learned.

    Args:
        seconds: of training until each evaluation, ascending; the first is 0.
        errors: the squared error after adaptation, at each.
        updates: how many were made.
        mean_staleness, most_stale: versions by which gradients lagged when they were applied.
        left_out: the part of the tasks that were not waited for.
    """

    seconds: tuple[float, ...]
    errors: tuple[float, ...]
    updates: int
    mean_staleness: float = 0.0
    most_stale: int = 0
    left_out: float = 0.0

    def at(self, seconds: float) -> float:
        """The error after so many seconds, on the straight line between two evaluations."""
        return float(np.interp(seconds, self.seconds, self.errors))


def read_curve(folder: Path) -> Curve:
    """Of a run directory."""
    steps = read_lines(folder / METRICS)
    evaluations = [e for e in read_lines(folder / EVALUATIONS) if e["split"] == "validation"]
    spent = list(itertools.accumulate((step["step_s"] for step in steps), initial=0.0))
    return Curve(
        (0.0, *(spent[e["version"]] for e in evaluations)),
        (evaluations[0]["pre_adaptation"], *(e["mean"] for e in evaluations)),
        len(steps),
        statistics.mean(step["staleness"] for step in steps),
        max(step.get("staleness_max", 0) for step in steps),
        sum(step.get("left_out", 0) for step in steps) / (WORKERS * len(steps)),
    )


def learn(side: str, seed: int, steps: int, every: int) -> Curve:
    """One run.

    Raises:
        SystemExit: it failed; with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        tasks = {
            "type": "custom", "import_path": "tools.bench.distribution_parts.uneven:UnevenSines",
            "args": {"wait_s": WAIT_S, "slow_by": SLOW_BY, "mark": f"{folder}/slow", "shots": 10, "query_shots": 10},
        }  # fmt: skip
        words = {
            "seed": seed, "tasks": tasks, "engine.compile": False,
            "outer": {"lr": 1e-3, "steps": steps, "meta_batch_size": WORKERS * TASKS, "tasks_per_microbatch": TASKS},
            "runtime": {"type": "ray", "workers": WORKERS, **SIDES[side]},
            "evaluation": {"episodes": 1, "every": every, "validation_episodes": WAVES},
            "tracking.wandb.mode": "disabled",
        }  # fmt: skip
        command = [sys.executable, "-m", "metadist.cli", "train", str(ROOT / "configs" / "sinusoid_maml.yaml")]
        command += [f"{k}={json.dumps(v)}" for k, v in words.items()] + ["--allow-code", "--run-dir", f"{folder}/run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{side}: the run ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return read_curve(Path(folder) / "run")


def rows_of(curves: Mapping[str, Sequence[Curve]]) -> list[dict[str, Any]]:
    """A row for each side.

    Args:
        curves: of each side those of the seeds, in one order.
    """
    fastest = [min(curve.seconds[-1] for curve in same) for same in zip(*curves.values(), strict=True)]
    rows = []
    for side, own in curves.items():
        row: dict[str, Any] = {
            "side": side, "ms_per_update": 1e3 * statistics.mean(c.seconds[-1] / c.updates for c in own),
        }  # fmt: skip
        pairs = list(zip(own, curves["waits"], fastest, strict=True))
        for name, difference, errors in (
            ("error", "", [(c.errors[-1], base.errors[-1]) for c, base, _ in pairs]),
            ("error_at_time", "at_time_", [(c.at(s), base.at(s)) for c, base, s in pairs]),
        ):
            less = [mine - base for mine, base in errors]
            row[name] = statistics.mean(mine for mine, _ in errors)
            row[f"{difference or 'error_'}less_waits"] = statistics.mean(less)
            row[f"{difference}standard_error"] = (
                statistics.stdev(less) / math.sqrt(len(less)) if len(less) > 1 else None
            )
        row["mean_staleness"] = statistics.mean(c.mean_staleness for c in own)
        row["most_stale"] = max(c.most_stale for c in own)
        row["left_out_percent"] = 100 * statistics.mean(c.left_out for c in own)
        rows.append(row)
    return rows


def draw(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Errors by updates and by seconds, a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_updates, by_seconds) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for number, (side, own) in enumerate(curves.items()):
        for curve in own:
            updates = [curve.updates * i / (len(curve.errors) - 1) for i in range(len(curve.errors))]
            label = side if curve is own[0] else None
            by_updates.plot(updates[1:], curve.errors[1:], color=f"C{number}", linewidth=1, label=label)
            by_seconds.plot(curve.seconds[1:], curve.errors[1:], color=f"C{number}", linewidth=1)
    by_updates.set(xlabel="updates", ylabel="squared error after adaptation")
    by_seconds.set(xlabel="seconds of training")
    by_updates.legend(frameon=False)
    for axes in (by_updates, by_seconds):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/bench/waiting.py --quick --json waiting.json --picture waiting.png",
    )  # fmt: skip
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), metavar="SIDE",
                        help="beside waits; default: all")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=1500, metavar="N", help="updates of a run (default: 1500)")
    parser.add_argument("--every", type=int, default=100, metavar="N", help="from evaluation to evaluation")
    parser.add_argument("--quick", action="store_true", help="one seed, 100 updates: some three minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows, the curves and how they came about")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the errors by updates and by seconds")
    found = parser.parse_args(words)
    if found.quick:
        found.seeds, found.steps, found.every = [0], 100, 20
    return found


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    curves: dict[str, list[Curve]] = {side: [] for side in dict.fromkeys(["waits", *options.sides])}
    for seed in options.seeds:
        for side, own in curves.items():
            own.append(learn(side, seed, options.steps, options.every))
            last = own[-1]
            print(f"seed {seed}  {side}: {last.errors[-1]:.3f} after {last.seconds[-1]:.0f} s", flush=True)
    rows = rows_of(curves)
    show_table(COLUMNS, [cells(row, COLUMNS) for row in rows], f"{options.steps} updates", words=1)
    if options.picture:
        draw(curves, options.picture)
    if options.json:
        keep_rows(options.json, rows, {
            "date": datetime.date.today().isoformat(), "seeds": options.seeds, "updates": options.steps,
            "workers": WORKERS, "tasks_per_microbatch": TASKS, "wait_s": WAIT_S, "slow_by": SLOW_BY,
            "cpu_cores": os.cpu_count(),
            "curves": {side: [{"seconds": c.seconds, "errors": c.errors} for c in own] for side, own in curves.items()},
        })  # fmt: skip


if __name__ == "__main__":
    main()
