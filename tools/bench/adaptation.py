"""The adaptation engine against its peers: milliseconds of a meta-gradient a task, and memory, on one CPU core.

Workloads (random inputs, fixed seed): A1 and A5, second-order MAML with the max-pooling Conv4-64 on 28x28 pictures,
5-way 1-shot, 15 queries a class, 32 tasks, 1 and 5 inner steps; B1 and B5, the same to first order; C, Conv4-32 on
84x84 pictures, 5-way 5-shot, 4 tasks, 5 steps; D1 and D5, sinusoids with an MLP 1-40-40-1, 10 shots, 25 tasks; E,
a memory-augmented network on 16 sequences of 50 pictures of 20x20.

Before anything is timed, every implementation's meta-gradient is compared with plain automatic differentiation task
by task in float64: a few tasks within 1e-7, run in float64 as well, and what is timed, in float32, within 5e-2 and five
times what rounding does to the plain form itself (with ReLU and max pooling it decides which way a kink goes). With
--quick, compiled settings are spared the first. One that differs is reported as WRONG and not timed. All
implementations of a workload run in one process, in interleaved rounds, of which the median counts; compilation and
warm-up lie outside ("first call").

Milliseconds are of processor time, all threads together, of which there is one: on a machine of one's own that is the
time on the wall, which is given beside it, and beside other work it is still what the computation takes.
On a GPU (--device cuda) it is the time on the wall until the GPU has done, with all tasks computed together, and
memory is that of tensors there.

Memory is measured in a process of its own for each, over what it held before the first call; for compiled settings
this includes what the compiler took. "of sgemm" is the share of the speed of a large matrix product, counting
the products and convolutions of the plain reference.

--growth measures something else: how memory grows with the inner steps, from what tensors take at most with one and
with ten of them, tracing aside, of whatever inductor does not compile; a task of each workload that has inner steps.

By default the processes run with the allocator settings that our workers run with, from which peers gain as well.

Peers come from the folder --peers; what is not there is listed with the reason. Install them with

  pip install --no-deps --target .peers higher==0.2.1 torchopt==0.7.3 torchmeta==1.8.0 parallel-metalearn==0.5.6 \\
      optree graphviz tqdm ordered-set
  pip install --target .peers-build cython setuptools wheel
  CYTHON_FORCE_REGEN=1 PYTHONPATH=$PWD/.peers-build pip install --no-deps --target .peers --use-pep517 \\
      --no-build-isolation --config-settings=--global-option=build_ext learn2learn==0.2.0

(--no-deps as some ask for an old torch; what they import for data sets alone is replaced by empty stand-ins;
learn2learn's published C sources do not fit a Python newer than 3.10, so they are made anew.)
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for tools.bench, from wherever this is run

from metadist.runtime.backend import ALLOCATOR  # noqa: E402
from tools.bench._tables import keep_rows  # noqa: E402
from tools.bench.adaptation_parts import measure, report  # noqa: E402
from tools.bench.adaptation_parts.workloads import WORKLOADS, make_job  # noqa: E402

ROUNDS, QUICK_ROUNDS = 5, 2
STEPS = (1, 10)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/bench/adaptation.py --quick --workloads A1,D5 --json adaptation.json",
    )
    parser.add_argument(
        "--quick", action="store_true",
        help=f"{QUICK_ROUNDS} rounds, fewer tasks and settings of ours, no memory: under five minutes",
    )  # fmt: skip
    parser.add_argument("--workloads", default=",".join(WORKLOADS), metavar="A1,...", help="[default: %(default)s]")
    parser.add_argument("--implementations", default="", metavar="WORD,...", help="only those whose name has a WORD")
    parser.add_argument("--rounds", type=int, help=f"[default: {ROUNDS}, with --quick {QUICK_ROUNDS}]")
    parser.add_argument("--json", type=Path, metavar="FILE", help='write {"rows": [...]} and how they came about')
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", metavar="DIR", help="[default: .peers]")
    parser.add_argument("--allocator", choices=("workers", "default"), default="workers",
                        help="glibc as our workers run it, or as it installs  [default: workers]")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[default: %(default)s]")
    parser.add_argument("--growth", action="store_true", help="measure how memory grows with the inner steps instead")
    parser.add_argument("--no-memory", action="store_true", help="leave out the measuring of memory")
    parser.add_argument("--tasks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    found = parser.parse_args(words)
    found.workloads = [w for w in found.workloads.split(",") if w]
    if unknown := [w for w in found.workloads if w not in WORKLOADS]:
        parser.error(f"no workload is called {unknown[0]}; there are {', '.join(WORKLOADS)}")
    found.implementations = tuple(w for w in found.implementations.split(",") if w)
    found.rounds = found.rounds or (QUICK_ROUNDS if found.quick else ROUNDS)
    if found.rounds < 1 or (found.tasks is not None and found.tasks < 1):
        parser.error("--rounds must be at least 1")
    return found


# ------------------------------------------------------------------ processes


def in_child(order: dict[str, Any], allocator: str) -> dict[str, Any]:
    """What a fresh process makes of an order; a process that died is a reason, not an error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if allocator == "workers":
        environment["GLIBC_TUNABLES"] = ALLOCATOR
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        words = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps({**order, "out": str(out)})]
        done = subprocess.run(words, env=environment, check=False)
        if not out.is_file():
            return {"died": f"its process ended with {done.returncode}"}
        return json.loads(out.read_text())


def child(order: dict[str, Any]) -> None:
    """Carries out one order: times a workload, or measures the memory of one implementation."""
    torch.set_num_threads(1)
    device = order["device"]
    workload, folder, tasks = WORKLOADS[order["workload"]], Path(order["peers"]), order["tasks"]
    found, left_out = measure.implementations(workload, folder, order["quick"], tuple(order["words"]), device)
    result: dict[str, Any]
    if "growth_of" in order:
        workload = replace(workload, steps=order["steps"])
        (one,) = [i for i in found if i.name == order["growth_of"]]
        job = make_job(workload, 1, torch.float32, device)
        try:
            held = measure.held_mb(one, job)
            result = {"mb": held, "parameters_mb": sum(p.nbytes for p in job.params.values()) / 1e6}
        except ImportError as e:  # a peer that is not installed
            result = {"died": str(e)}
    elif "memory_of" in order:
        (one,) = [i for i in found if i.name == order["memory_of"]]
        result = {"peak_mb": measure.peak_mb(one, make_job(workload, tasks, torch.float32, device))}
    else:
        result = measure.measure(workload, found, tasks, order["rounds"], order["quick"], say, device)
        result["left_out"] = {**left_out, **result["left_out"]}
    Path(order["out"]).write_text(json.dumps(result))


def say(text: str) -> None:
    """Progress, beside the results."""
    print(text, file=sys.stderr, flush=True)


def order_of(name: str, options: argparse.Namespace, tasks: int) -> dict[str, Any]:
    """What every process that measures a workload is told."""
    return {
        "workload": name, "peers": str(options.peers.resolve()), "quick": options.quick,
        "words": options.implementations, "rounds": options.rounds, "device": options.device, "tasks": tasks,
    }  # fmt: skip


def run_workload(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times one workload, then measures the memory of each implementation."""
    workload = WORKLOADS[name]
    order = order_of(name, options, options.tasks or (workload.quick_tasks if options.quick else workload.tasks))
    result = in_child(order, options.allocator)
    if "died" in result:
        return {"rows": [], "left_out": {name: result["died"]}}
    if not (options.quick or options.no_memory):
        for row in result["rows"]:
            row["peak_mb"] = in_child({**order, "memory_of": row["implementation"]}, options.allocator).get("peak_mb")
    return result


def growth(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """How the memory of each implementation that inductor does not compile grows from one inner step to ten."""
    words, device = options.implementations, options.device
    found, _ = measure.implementations(WORKLOADS[name], options.peers, options.quick, words, device)
    order = order_of(name, options, 1)
    rows = []
    for one in (i for i in found if "compiled" not in i.name):  # what inductor's code takes is seen by nobody
        say(f"{name} {one.name}")
        few, many = (in_child({**order, "growth_of": one.name, "steps": n}, options.allocator) for n in STEPS)
        if why := few.get("died") or many.get("died"):
            print(f"left out: {one.name}: {why}")
            continue
        grown = (many["mb"] - few["mb"]) / (STEPS[1] - STEPS[0])
        rows.append({
            "workload": name, "implementation": one.name, "mb_of_1": few["mb"], "mb_of_10": many["mb"],
            "copies_a_step": grown / few["parameters_mb"],
        })  # fmt: skip
    return rows


# ------------------------------------------------------------------ the command


def setup(options: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """How the rows came about."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu_cores": os.cpu_count(),
        "threads": 1,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "allocator": ALLOCATOR if options.allocator == "workers" else "as installed",
        "quick": options.quick,
        "workloads": {
            name: {k: r.get(k) for k in ("left_out", "attainable_gflops", "tolerances")} for name, r in results.items()
        },
    }


def main() -> None:
    options = arguments()
    if options.child:
        child(json.loads(options.child))
        return
    print(f"allocator: {ALLOCATOR if options.allocator == 'workers' else 'as installed'}; one thread; "
          f"torch {torch.__version__}; {options.rounds} rounds\n", flush=True)  # fmt: skip
    if options.growth:
        rows: list[dict[str, Any]] = []
        for name in (n for n in options.workloads if WORKLOADS[n].steps):
            rows += (found := growth(name, options))
            report.show_growth(f"{name}: {WORKLOADS[name].title}", found)
            if options.json:
                keep_rows(options.json, rows, setup(options, {}))
        return
    results = {}
    for name in options.workloads:
        results[name] = run_workload(name, options)
        report.show(f"{name}: {WORKLOADS[name].title}", results[name])
        if options.json:  # after each, so that a run that is stopped leaves what it has
            keep_rows(options.json, [row for r in results.values() for row in r["rows"]], setup(options, results))


if __name__ == "__main__":
    main()
