"""How throughput grows with workers, and what one slow worker costs.

Workers are emulated: they wait for a given time where they would compute, so that a machine with two cores can hold 64
of them. Leases, object store, sum, update and commit are the real ones.

``scaling``: steps of one microbatch a worker. Efficiency is the wait over the step. Beside it stands what
``metadist.simulator`` predicts: the controller's own code over modelled workers, which share this machine's cores. Its
costs of messages are CPU seconds, measured in the same run before the curve, in steps of 3 and of 24 workers with the
same wait: what grows with the workers is taken for a lease's, the rest for a step's. No time of a step goes into them,
and the curve has neither of these numbers of workers unless --workers asks for one.
``straggler``: eight workers, one of them five times slower, with one microbatch for each; and one ten times slower,
with four for each. Plain synchronous steps (equal shares, nothing leased twice), those of the controller, which deals
by measured speed and leases again what is late, and steps of eight equal workers, in turns. The weights after as many
steps are checked to be the same in all three.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for tools.bench, from wherever this is run, and for the workers

from metadist.config.schema import RuntimeConfig  # noqa: E402
from metadist.runtime.cluster import connect  # noqa: E402
from metadist.simulator import Arrangement, Cluster, Compute, Costs, Work, simulate  # noqa: E402
from metadist.simulator.presets import this_machine  # noqa: E402
from tools.bench._tables import cells, keep_rows, show_table  # noqa: E402
from tools.bench.distribution_parts.calibration import Measured, costs_of, measured_steps  # noqa: E402
from tools.bench.distribution_parts.emulated import EmulatedRun, OneSlowWorker, numbers  # noqa: E402

SCALING = ("workers", "microbatch_ms", "ms_per_step", "efficiency", "predicted_ms", "measured_over_predicted")
STRAGGLER = (
    "workers", "slow_by", "microbatches", "microbatch_ms", "plain_ms", "equal_ms", "ms_per_step", "ratio_to_plain",
    "ratio_to_equal", "releases",
)  # fmt: skip
CALIBRATION = (3, 24)
WARM_UP, EIGHT = 4, 8
SLOW = ((5.0, 1), (10.0, 4))


def predicted_step(workers: int, seconds: float, costs: Costs) -> float:
    """Seconds of a step, as simulated."""
    here = this_machine()
    work = Work(workers, 4.0 * numbers("conv4"), Compute(seconds))
    return simulate(work, Arrangement(), Cluster(here.machine, here.network, costs)).step_s


def scaling(counts: Sequence[int], seconds: float, steps: int) -> tuple[list[dict[str, Any]], list[Measured]]:
    """A row for each number of workers, and what the predictions are made of."""
    basis = [measured_steps(workers, seconds, steps) for workers in CALIBRATION]
    costs = costs_of(basis[0], basis[1])
    rows = []
    for workers in counts:
        found, predicted = measured_steps(workers, seconds, steps), predicted_step(workers, seconds, costs)
        rows.append({
            "workers": workers, "microbatch_ms": 1e3 * seconds, "ms_per_step": 1e3 * found.step_s,
            "efficiency": seconds / found.step_s, "predicted_ms": 1e3 * predicted,
            "measured_over_predicted": found.step_s / predicted, "steps": steps,
            "cpu_ms": {kind: 1e3 * s for kind, s in found.cpu_s.items()},
        })  # fmt: skip
    return rows, basis


def straggler(seconds: float, steps: int, slow_by: float, each: int, rounds: int = 3) -> dict[str, Any]:
    """The row of one slow worker among eight.

    Args:
        seconds: that a worker's share of a step takes.
        steps: timed in a turn.
        slow_by: how many times slower the one is.
        each: microbatches of a step, for each worker.
        rounds: turns.

    Raises:
        AssertionError: the weights differ.
    """
    runs: dict[str, EmulatedRun] = {}
    times: dict[str, list[float]] = {"plain": [], "equal": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in times:
                make = functools.partial(OneSlowWorker, Path(folder) / name, 1.0 if name == "equal" else slow_by)
                runs[name] = EmulatedRun(
                    "conv4", EIGHT, microbatches=each * EIGHT, seconds=seconds / each, make_worker=make,
                    equal_shares=name == "plain",
                )  # fmt: skip
            for name, run in runs.items():
                run.steps(WARM_UP)
                assert run.version == WARM_UP, name
            for _ in range(rounds):
                for name, run in runs.items():
                    times[name] += run.steps(steps)
            assert len({run.weights().tobytes() for run in runs.values()}) == 1, (
                "the weights with duplicate leases are not those without"
            )
            releases = runs["ours"].controller.releases
        finally:
            for run in runs.values():
                run.close()
    # Means: what is saved in most steps must not be paid for in a few.
    plain, ours, equal = (statistics.mean(times[name]) for name in ("plain", "ours", "equal"))
    return {
        "workers": EIGHT, "slow_by": slow_by, "microbatches": each * EIGHT, "microbatch_ms": 1e3 * seconds / each,
        "plain_ms": 1e3 * plain, "equal_ms": 1e3 * equal, "ms_per_step": 1e3 * ours, "ratio_to_plain": ours / plain,
        "ratio_to_equal": ours / statistics.median(times["equal"]), "releases": releases, "steps": steps * rounds,
    }  # fmt: skip


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/bench/scaling.py --quick --json scaling.json",
    )  # fmt: skip
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64], metavar="N",
                        help="default: 1 2 4 8 16 32 64")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0.2, metavar="S", help="of a microbatch (default: 0.2)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="timed of each (default: 20)")
    parser.add_argument("--only", choices=["scaling", "straggler"], help="leave the other part out")
    parser.add_argument("--quick", action="store_true", help="up to 8 workers, fewer steps: under five minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help='write {"rows": [...]} and how they came about')
    found = parser.parse_args(words)
    if found.quick:
        found.workers, found.steps = [1, 4, 8], 10
    return found


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    rows: list[dict[str, Any]] = []
    basis: list[Measured] = []
    connect(RuntimeConfig(workers=max([*options.workers, *CALIBRATION, 3 * EIGHT])))
    try:
        if options.only != "straggler":
            rows, basis = scaling(options.workers, options.seconds, options.steps)
            show_table(SCALING, [cells(row, SCALING) for row in rows], "scaling", words=0)
        if options.only != "scaling":
            slow = [straggler(options.seconds, options.steps, slow_by, each) for slow_by, each in SLOW]
            show_table(STRAGGLER, [cells(row, STRAGGLER) for row in slow], "straggler", words=0)
            rows += slow
    finally:
        ray.shutdown()
    if options.json:
        keep_rows(options.json, rows, {
            "date": datetime.date.today().isoformat(), "cpu_cores": os.cpu_count(), "ray": ray.__version__,
            "calibrated_with": [dataclasses.asdict(measured) for measured in basis],
        })  # fmt: skip


if __name__ == "__main__":
    main()
