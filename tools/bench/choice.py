"""How good the engine's choice is: what `metadist bench` finds, and what `engine: auto` takes, beside the best by hand.

The workloads of tools/bench/adaptation.py as configs of two workers. For each, `metadist bench` searches as it does for
users. By hand then everything is tried that it left out: each convolution and number of tasks together, traced and
compiled. All that came within a fifth of the fastest is timed once more in turns, with the choice and with auto, and
the ratios are medians of the ratios within each round. `auto` has the config's number of tasks together, which stands
under `outer`: it is compared with the best of that number, and of all.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for tools.bench, from wherever this is run

from metadist.benchmark import EngineBench, Way  # noqa: E402
from tools.bench._tables import cells, keep_rows, show_table  # noqa: E402
from tools.bench.adaptation_parts.workloads import WORKLOADS, Workload, experiment  # noqa: E402

COLUMNS = ("workload", "by_hand", "written", "written_ratio", "auto", "auto_ratio", "auto_ratio_of_all", "ways")
TOGETHER = {"A": 4, "B": 4, "C": 1, "D": 25, "E": 8}
"""Tasks of a microbatch, as the shipped configs of these families have them."""
STEPS = 10_000
FIELD = 1.2
"""How far from the fastest a way may be to be timed again."""


def compare(workload: Workload, rounds: int, inductor: bool) -> dict[str, Any]:
    """One row: the choices for a workload, and how far each is from the best."""
    made = experiment(
        workload, {}, torch.float32,
        outer={"steps": STEPS, "tasks_per_microbatch": TOGETHER[workload.family]},
        runtime={"type": "local"} if workload.family == "D" else {"type": "ray", "workers": 2},
    )  # fmt: skip
    bench = EngineBench(made, rounds, inductor, say)
    written = bench.run().way
    say(f"{workload.name}: metadist bench writes {written.name}; now by hand")
    forms = ("trace", True) if inductor else ("trace",)
    bench.measure(
        Way("vectorised", form, convolution, False, tasks)
        for tasks in dict.fromkeys([*bench.sizes(), TOGETHER[workload.family]])
        for convolution in bench.convolutions
        for form in forms
    )
    least = bench.best().ms_per_task or 0.0
    last = [w for w, t in bench.timings.items() if t.seconds and (t.ms_per_task or 0) <= FIELD * least]
    same = [w for w in bench.timings if w.tasks == bench.automatic.tasks and bench.timings[w].seconds]
    nearest = min(same, key=lambda w: bench.timings[w].ms_per_task or 0.0)
    times = bench.in_turns([written, bench.automatic, nearest, *last], 4 * rounds)
    by_hand = min(times, key=lambda w: statistics.median(times[w]))
    alike = min((w for w in times if w.tasks == bench.automatic.tasks), key=lambda w: statistics.median(times[w]))
    return {
        "workload": workload.name,
        "by_hand": by_hand.name,
        "written": written.name,
        "written_ratio": ratio(times[written], times[by_hand]),
        "auto": bench.automatic.name,
        "auto_ratio": ratio(times[bench.automatic], times[alike]),
        "auto_ratio_of_all": ratio(times[bench.automatic], times[by_hand]),
        "ways": len(bench.timings),
        "ms_per_task": {w.name: 1e3 * statistics.median(t) for w, t in times.items()},
    }


def ratio(ours: list[float], best: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, best, strict=True))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/bench/choice.py --quick --workloads D1",
    )  # fmt: skip
    parser.add_argument("--workloads", default=",".join(WORKLOADS), metavar="A1,...", help="[default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each way [default: %(default)s]")
    parser.add_argument("--no-compile", action="store_true", help="leave inductor out")
    parser.add_argument("--quick", action="store_true", help="one round, and no inductor")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows")
    args = parser.parse_args()
    names = args.workloads.split(",")
    if unknown := set(names) - set(WORKLOADS):
        parser.error(f"no workload {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    inductor = not (args.no_compile or args.quick)
    rows = []
    for name in names:
        workload = WORKLOADS[name]
        workload = replace(workload, tasks=workload.quick_tasks) if args.quick else workload
        rows.append(compare(workload, 1 if args.quick else args.rounds, inductor))
        if args.json:
            setup = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "rounds": args.rounds}
            keep_rows(args.json, rows, {**setup, "inductor": inductor, "threads": torch.get_num_threads()})
    show_table(COLUMNS, [cells(row, COLUMNS) for row in rows], words=3)


if __name__ == "__main__":
    main()
