"""What a step would take with 8 to 4,096 workers and models of 0.5 MB to 10 GB, and how such a run is best arranged.

The product's own controller is driven over modelled workers on a virtual clock (``metadist.simulator``). For each
number of workers and size of the model: time a step of the plain arrangement (one server, everybody waited for, late
work leased twice), what most of it is, its efficiency; the topology and number of shards with which it is shortest with
the same bits (the simplest within 5 %); and, for that, what hedging gains: a tenth of the workers being slower, updates
that lease late work twice, that go on with nine tenths (``quorum``), or that do not wait (``max_staleness: 4``), each
beside waiting for everybody; these two with the best server, where all-reduce is better still, and the last without
sums on nodes. They change what is learned, which no simulation tells.

Clusters: ``two_cores``, measured by ``--calibrate``; ``gpu_10g`` and ``gpu_100g``, nodes of eight GPUs, whose numbers
are assumed. ``--calibrate`` measures this machine first: CPU seconds of messages from steps of 3 and of 24 workers that
wait, and the speeds of object store, sum, update and sockets; with ``--json`` they are kept beside the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from metadist.simulator import Arrangement, Cluster, Compute, Costs, Machine, Work, simulate, split  # noqa: E402
from metadist.simulator.advice import best_of, choices, words_of  # noqa: E402
from metadist.simulator.presets import PRESETS  # noqa: E402
from tools.bench._tables import cells, keep_rows, show_table  # noqa: E402

COLUMNS = (
    "model_mb", "workers", "ms_per_step", "binds", "efficiency", "best", "best_ms", "best_efficiency",
    "wait_for_all_ms", "leased_twice_ms", "quorum_ms", "unwaiting_ms",
)  # fmt: skip
CALIBRATION = (3, 24)
SLOW_BY = 3.0
HEDGES = {
    "wait_for_all_ms": {"duplicates": False}, "leased_twice_ms": {}, "quorum_ms": {"quorum": 0.9},
    "unwaiting_ms": {"max_staleness": 4, "node_sums": False},
}  # fmt: skip
OF_A_SERVER = ("quorum_ms", "unwaiting_ms")


def row_of(workers: int, model_mb: float, seconds: float, variation: float, cluster: Cluster) -> dict[str, Any]:
    """One line of the table.

    Args:
        workers: with a microbatch each.
        model_mb: of the model, in float32.
        seconds: of a microbatch, the mean.
        variation: its coefficient of variation.
        cluster: that it is on.
    """
    work = Work(workers, 1e6 * model_mb, Compute(seconds, variation))
    plain = split(work, Arrangement(), cluster, 1, 0)
    found = choices(work, cluster, unordered=True)
    best = best_of([c for c in found if c.arrangement.topology != "allreduce_unordered"])
    row: dict[str, Any] = {
        "model_mb": model_mb, "workers": workers, "ms_per_step": 1e3 * plain.outcome.step_s, "binds": plain.binds,
        "efficiency": plain.outcome.efficiency, "best": words_of(best.arrangement), "best_ms": 1e3 * best.step_s,
        "best_efficiency": seconds / best.step_s,
        "split_ms": {part: 1e3 * s for part, s in plain.seconds.items()},
        "choices_ms": {words_of(c.arrangement): 1e3 * c.step_s for c in found},
    }  # fmt: skip
    slow = dataclasses.replace(work.compute, slow_workers=workers // 10, slow_by=SLOW_BY)
    uneven = dataclasses.replace(work, compute=slow)
    server = best_of([c for c in found if c.arrangement.topology == "server"]).arrangement
    for name, changes in HEDGES.items():
        arrangement = dataclasses.replace(server if name in OF_A_SERVER else best.arrangement, **changes)
        row[name] = 1e3 * simulate(uneven, arrangement, cluster, 1, 2).step_s
    return row


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Efficiency against workers, a line for each model: as it is by default, and with the best arrangement."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for i, model in enumerate(sorted({row["model_mb"] for row in rows})):
        of_it = [row for row in rows if row["model_mb"] == model]
        workers = [row["workers"] for row in of_it]
        axes.plot(workers, [row["best_efficiency"] for row in of_it], f"C{i}o-", label=f"{model:g} MB")
        axes.plot(workers, [row["efficiency"] for row in of_it], f"C{i}:")
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="workers", ylabel="efficiency: computing, as a part of a step")
    axes.set_xticks(sorted({row["workers"] for row in rows}))
    axes.get_xaxis().set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.set_title(title, fontsize="medium")
    axes.legend(title="best arrangement; dotted: one server", fontsize="small", title_fontsize="small")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def finite(value: Any) -> Any:
    """The same with null for what is infinite, which JSON has no word for."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isinf(value) else value


def measured_cluster(seconds: float, steps: int) -> tuple[Cluster, dict[str, Any]]:
    """This machine, measured now, and the measurements."""
    import ray

    from metadist.config.schema import RuntimeConfig
    from metadist.runtime.cluster import connect
    from tools.bench.distribution_parts.calibration import calibrated

    connect(RuntimeConfig(workers=CALIBRATION[1]))
    try:
        found = calibrated(seconds, steps, CALIBRATION)
    finally:
        ray.shutdown()
    today = datetime.date.today().isoformat()
    source = f"measured on {today}, {os.cpu_count()} cores"
    return Cluster(Machine(**found["machine"]), costs=Costs(**found["costs"]), source=source), found


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/bench/simulate.py --quick --json simulated.json --picture simulated.png",
    )  # fmt: skip
    parser.add_argument("--workers", nargs="+", type=int, default=[8, 64, 512, 4096], metavar="N",
                        help="default: 8 64 512 4096")  # fmt: skip
    parser.add_argument("--model-mb", nargs="+", type=float, default=[0.5, 10, 100, 1000, 10000], metavar="MB",
                        help="default: 0.5 10 100 1000 10000")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of a microbatch (default: 1)")
    parser.add_argument("--variation", type=float, default=0.1, metavar="CV",
                        help="coefficient of variation of that (default: 0.1)")  # fmt: skip
    parser.add_argument("--cluster", choices=sorted(PRESETS), default="gpu_10g", help="default: gpu_10g")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine and simulate that")
    parser.add_argument("--quick", action="store_true", help="8 and 64 workers, three models")
    parser.add_argument("--json", type=Path, metavar="FILE", help='write {"rows": [...]} and how they came about')
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw efficiency against workers")
    found = parser.parse_args(words)
    if found.quick:
        found.workers, found.model_mb = [8, 64], [0.5, 100.0, 1000.0]
    return found


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    cluster, measurements = PRESETS[options.cluster], {}
    if options.calibrate:
        cluster, measurements = measured_cluster(0.2, 8 if options.quick else 20)
    rows, start = [], time.perf_counter()
    for model_mb in options.model_mb:
        for workers in options.workers:
            rows.append(row_of(workers, model_mb, options.seconds, options.variation, cluster))
            print(f"{model_mb:g} MB, {workers} workers: {time.perf_counter() - start:.0f} s so far", file=sys.stderr)
    title = f"a microbatch of {options.seconds:g} s; {cluster.source}"
    show_table(COLUMNS, [cells(row, COLUMNS) for row in rows], title)
    if options.picture:
        draw(rows, options.picture, title)
    if options.json:
        keep_rows(options.json, rows, {
            "date": datetime.date.today().isoformat(), "microbatch_s": options.seconds, "variation": options.variation,
            "slow_workers": f"a tenth, {SLOW_BY:g} times slower, in the last four columns",
            "cluster": finite(dataclasses.asdict(cluster)), "measurements": measurements,
        })  # fmt: skip


if __name__ == "__main__":
    if "--calibrate" in sys.argv:
        from tools.bench.server import as_in_a_server

        as_in_a_server()
    main()
