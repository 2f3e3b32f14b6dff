"""What the distributed layer costs: the time of a meta-update whose microbatches cost nothing to compute.

Workers answer at once, each with the gradient of one microbatch, made before; leases, sum, update and commit are the
real ones. A real worker makes its gradient in memory of the node, where the server reads it: so there it lies, and is
not copied. Ray's example has it in arrays of its own, which Ray copies into its store.
Beside it, in turns, with the processes of all living at once where memory has room for them:

- the pattern of Ray's parameter-server example: state dicts and lists of arrays (``speedup_over_ray_example``),
- Ray calls of the same number that carry nothing (``ratio_to_empty_calls``),
- gloo's all-reduce of the flat vector, which sums and does not update.

Before anything is timed, all are checked to come to the same weights, or the same sum.

``--run CONFIG`` asks the same of a real run with two workers: the part of a step that none of its workers computes,
which is the step less what the busiest of them computed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for tools.bench, from wherever this is run, and for the workers

from metadist.config.schema import RuntimeConfig  # noqa: E402
from metadist.runtime.cluster import connect  # noqa: E402
from tools.bench._tables import cells, keep_rows, show_table  # noqa: E402
from tools.bench.distribution_parts.emulated import EmulatedRun, gradient, numbers  # noqa: E402
from tools.bench.distribution_parts.peers import Example  # noqa: E402

COLUMNS = ("model_mb", "workers", "ms_per_step", "ray_example_ms", "speedup_over_ray_example", "empty_calls_ms",
           "ratio_to_empty_calls", "all_reduce_ms")  # fmt: skip
RUN = ("config", "workers", "steps", "ms_per_step", "computed_ms", "layer_ms", "layer_part")
WARM_UP, RUN_WARM_UP = 3, 20


def compare(
    model: str, workers: int, rounds: int, turn_s: float, shards: int = 1, together: bool | None = None
) -> dict[str, Any]:
    """One row: every side of a model and a number of workers, in turns.

    Args:
        model: see :func:`~tools.bench.distribution_parts.emulated.shapes`.
        workers: of each side.
        rounds: turns of each side.
        turn_s: seconds of a turn.
        shards: of the parameter server.
        together: whether the processes of both sides live at once; else those of each begin anew with every turn.
            None: if there is memory for both.

    Raises:
        AssertionError: they do not compute the same.
    """
    together = memory_for_both(model, workers) if together is None else together
    makers: list[Callable[[], Side]] = [
        lambda: Ours(EmulatedRun(model, workers, shards=shards, equal_shares=True)),
        lambda: Theirs(Example(model, workers), model, workers),
    ]
    found: dict[str, list[float]] = {}
    weights: dict[int, np.ndarray] = {}
    for life in range(1 if together else rounds):
        for group in [[0, 1]] if together else [[life % 2], [1 - life % 2]]:
            with contextlib.ExitStack() as stack:
                there = []
                for i in group:
                    there.append(makers[i]())
                    stack.callback(there[-1].close)
                for i, side in zip(group, there, strict=True):
                    weights[i] = side.warmed_up()
                if len(weights) == 2:
                    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-4, atol=1e-6)
                sides = {name: timed for side in there for name, timed in side.sides().items()}
                for name, times in in_turns(sides, rounds if together else 1, turn_s).items():
                    found.setdefault(name, []).extend(times)
    ms = {name: 1e3 * statistics.median(times) for name, times in found.items()}
    speedups = [b / a for a, b in zip(found["ours"], found["example"], strict=True)]
    return {
        "model_mb": round(numbers(model) * 4 / 1e6, 2), "workers": workers, "server_shards": shards,
        "ms_per_step": ms["ours"], "ray_example_ms": ms["example"], "empty_calls_ms": ms["empty"],
        "all_reduce_ms": ms["all_reduce"], "speedup_over_ray_example": statistics.median(speedups),
        "ratio_to_empty_calls": statistics.median(a / b for a, b in zip(found["ours"], found["empty"], strict=True)),
        "rounds": rounds, "together": int(together),
    }  # fmt: skip


def memory_for_both(model: str, workers: int) -> bool:
    """Whether the processes of both sides find room: each worker holds the model about three times."""
    needed = 2 * workers * (350e6 + 3 * 4 * numbers(model))
    # Above 95 % of the machine's memory Ray ends processes.
    return needed < 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Side(Protocol):
    """Processes that are timed."""

    def warmed_up(self) -> np.ndarray:
        """Makes the steps that do not count; the weights after them."""

    def sides(self) -> dict[str, Callable[[int], Any]]:
        """What is timed, by name: each makes so many steps."""

    def close(self) -> None:
        """Ends them."""


class Ours:
    """The distributed layer."""

    def __init__(self, run: EmulatedRun) -> None:
        self._run, self.close = run, run.close

    def warmed_up(self) -> np.ndarray:
        self._run.steps(WARM_UP)
        return self._run.weights()

    def sides(self) -> dict[str, Callable[[int], Any]]:
        return {"ours": self._run.steps}


class Theirs:
    """What it is compared with."""

    def __init__(self, example: Example, model: str, workers: int) -> None:
        self._example, self.close = example, example.close
        self._model, self._workers = model, workers

    def warmed_up(self) -> np.ndarray:
        for _ in range(WARM_UP):
            self._example.step()
            self._example.empty_step()
        weights = self._example.flat_weights()
        length = numbers(self._model)
        total = sum(gradient(length, m)[:1000].astype(np.float64) for m in range(self._workers))
        np.testing.assert_allclose(self._example.all_reduce(1), total, rtol=1e-4, atol=1e-5)
        return weights

    def sides(self) -> dict[str, Callable[[int], Any]]:
        return {
            "example": lambda n: [self._example.step() for _ in range(n)],
            "empty": lambda n: [self._example.empty_step() for _ in range(n)],
            "all_reduce": self._example.all_reduce,
        }


def in_turns(sides: dict[str, Callable[[int], Any]], rounds: int, turn_s: float) -> dict[str, list[float]]:
    """Seconds a step of each side in each round; the sides take turns, beginning with another one every round."""
    steps = {}
    for name, side in sides.items():
        start = time.perf_counter()
        side(1)
        steps[name] = max(1, min(200, round(turn_s / (time.perf_counter() - start))))
    names, found = list(sides), {name: [0.0] * rounds for name in sides}
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            start = time.perf_counter()
            sides[name](steps[name])
            found[name][r] = (time.perf_counter() - start) / steps[name]
    return found


def of_a_run(config: str, words: list[str], steps: int, workers: int = 2) -> dict[str, Any]:
    """The row of a run of ``metadist train``.

    Args:
        config: a config file.
        words: ``key=value``, on top of it.
        steps: timed, after some that warm up.
        workers: how many.

    Raises:
        CalledProcessError: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        fixed = {
            "runtime.type": "ray", "runtime.workers": workers, "outer.steps": steps + RUN_WARM_UP,
            "checkpoint.every": 10**6, "evaluation.every": 0, "evaluation.episodes": 20,
            "tracking.wandb.mode": "disabled", "tracking.console": "false",
        }  # fmt: skip
        command = [sys.executable, "-m", "metadist.cli", "train", config, *(f"{k}={v}" for k, v in fixed.items())]
        subprocess.run(
            [*command, *words, "--run-dir", f"{folder}/run"], check=True, stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return {"config": Path(config).stem, "workers": workers, **layer_of(lines[RUN_WARM_UP:])}


def layer_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the lines of a ``metrics.jsonl``: of the step, the busiest worker and what is between them."""
    step, computed = [x["step_s"] for x in lines], [max(x["worker_s"].values()) for x in lines]
    between = [a - b for a, b in zip(step, computed, strict=True)]
    return {
        "steps": len(lines), "ms_per_step": 1e3 * statistics.median(step),
        "computed_ms": 1e3 * statistics.median(computed), "layer_ms": 1e3 * statistics.median(between),
        "layer_part": statistics.median(a / b for a, b in zip(between, step, strict=True)),
    }  # fmt: skip


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/bench/step_overhead.py --quick --json step_overhead.json",
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", default=["conv4", "100"], metavar="MODEL",
                        help="conv4, or a size in MB (default: conv4 100)")  # fmt: skip
    parser.add_argument("--workers", nargs="+", type=int, default=[4, 16], metavar="N", help="default: 4 16")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="of the parameter server (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each side (default: 7)")
    parser.add_argument("--turn-s", type=float, default=2.0, metavar="S", help="seconds of a turn (default: 2)")
    parser.add_argument("--run", nargs="+", metavar="CONFIG [KEY=VALUE]", help="look at a run in place of all this")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="of that run (default: 200)")
    parser.add_argument("--quick", action="store_true", help="4 workers, shorter turns: under five minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help='write {"rows": [...]} and how they came about')
    found = parser.parse_args(words)
    if found.quick:
        found.workers, found.rounds, found.turn_s = [4], 5, 0.5
    return found


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    setup = {"date": datetime.date.today().isoformat(), "cpu_cores": os.cpu_count(), "torch": torch.__version__,
             "ray": ray.__version__}  # fmt: skip
    if options.run:
        config, *changes = options.run
        row = of_a_run(config, changes, options.steps)
        if options.json:
            keep_rows(options.json, [row], setup)
        show_table(RUN, [cells(row, RUN)])
        return
    rows = []
    for model, workers in itertools.product(options.models, options.workers):
        connect(RuntimeConfig(workers=2 * workers))
        try:
            rows.append(compare(model, workers, options.rounds, options.turn_s, options.shards))
        finally:
            ray.shutdown()
        # The largest come last, and what was measured before is kept whatever becomes of them.
        if options.json:
            keep_rows(options.json, rows, setup)
        print(f"{model} with {workers} workers: {rows[-1]['ms_per_step']:.3g} ms a step", file=sys.stderr, flush=True)
    show_table(COLUMNS, [cells(row, COLUMNS) for row in rows], words=0)


if __name__ == "__main__":
    main()
