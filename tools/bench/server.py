"""The parameter server's two passes over memory: the sum of 16 x 100 MB by the fixed tree, and Adam on 25 M parameters.

Each is beside the memory's own speed, measured between the timings: that at which the same gradients are read by sums
over each, or that of an addition into a third array, whichever is higher. What a pass must move at least: every
gradient read and the mean written; that, two moments and parameters read, the latter three written. The sum comes with
the division by the number of tasks and the norm, as in a server. Its bits are first checked against NumPy's by the same
tree, the update against torch.optim.Adam. It runs with the memory allocator set as in a server's process.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from metadist.config.schema import OuterConfig  # noqa: E402
from metadist.outer.gradient import Block, TreeSum  # noqa: E402
from metadist.outer.update import MetaUpdate, Prepared  # noqa: E402
from metadist.outer.vectors import Addends  # noqa: E402
from metadist.runtime.backend import ALLOCATOR  # noqa: E402
from tools.bench._tables import keep_rows, show_table  # noqa: E402

COLUMNS = ("pass", "megabytes_moved", "ms", "gb_per_s", "memory_gb_per_s", "share")
VECTORS, WIDTH = 16, 1000
OPTIONS = {"lr": 1e-3, "steps": 100, "optimizer": "adam"}


def seconds(what: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def as_held(vectors: list[np.ndarray]) -> Addends:
    """The gradients of a version as the server has them when it is to make an update."""
    held = TreeSum(len(vectors))
    for m, vector in enumerate(vectors):
        held.add(Block(0, m), vector)
    return held.addends()


def plain_tree(vectors: list[np.ndarray]) -> np.ndarray:
    """The same tree by NumPy, for a number of vectors that is a power of two."""
    while len(vectors) > 1:
        vectors = [a + b for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def check(numel: int) -> None:
    """Raises if sum or update are not what they are measured as."""
    few = [np.random.default_rng(m).standard_normal(min(numel, 100_003)).astype(np.float32) for m in range(VECTORS)]
    if as_held(few).sum().tobytes() != plain_tree(few).tobytes():
        raise AssertionError("the sum has not the bits of the tree")
    start = torch.from_numpy(few[0])
    ours, reference = MetaUpdate(start, options(len(start))), torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([reference], lr=OPTIONS["lr"])
    for gradient in few[1:4]:
        ours.apply(torch.from_numpy(gradient.copy()), 1)
        reference.grad = torch.from_numpy(gradient.copy())
        adam.step()
    torch.testing.assert_close(ours.vector, reference.detach(), rtol=1e-5, atol=1e-7)


def options(numel: int) -> dict[str, Any]:
    """An ``outer`` section for a vector of square matrices of a thousand rows."""
    sizes = [WIDTH * WIDTH] * (numel // WIDTH**2)
    sizes += [numel - sum(sizes)] if numel > sum(sizes) else []
    return {**OuterConfig(**OPTIONS).model_dump(), "sizes": sizes, "rules": []}


def measured(numel: int, rounds: int) -> list[dict[str, Any]]:
    """One row for the sum and one for the update, each beside the memory's speed in the same rounds."""
    vectors = [np.full(numel, 1.0 + m, np.float32) for m in range(VECTORS)]
    update = MetaUpdate(torch.zeros(numel), options(numel))
    everything = [torch.from_numpy(v) for v in vectors]
    a, b, c = everything[:3]
    size = 4 * numel / 1e6
    times: dict[str, list[float]] = {"sum": [], "read": [], "update": [], "triad": []}
    for turn in range(rounds + 1):
        prepared: list[Prepared] = []
        found = {
            "read": seconds(lambda: [float(v.sum()) for v in everything]),
            "sum": seconds(lambda made=prepared: made.append(update.prepare(as_held(vectors), 4.0))),
            "triad": seconds(lambda: torch.add(a, b, out=c)),
            "update": seconds(lambda made=prepared: update.move(made.pop())),
        }
        for name, taken in found.items():
            if turn:
                times[name].append(taken)
    memory = max(VECTORS * size / statistics.median(times["read"]), 3 * size / statistics.median(times["triad"])) / 1e3
    moved = {"sum": (VECTORS + 1) * size, "update": 7 * size}
    rows = []
    for name in ("sum", "update"):
        taken = statistics.median(times[name])
        speed = moved[name] / 1e3 / taken
        rows.append({
            "pass": name, "megabytes_moved": round(moved[name]), "ms": taken * 1e3, "gb_per_s": speed,
            "memory_gb_per_s": memory, "share": speed / memory,
        })  # fmt: skip
    return rows


def as_in_a_server() -> None:
    """Begins anew with the allocator's settings, which are read when a process begins."""
    if os.environ.get("GLIBC_TUNABLES") != ALLOCATOR:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": ALLOCATOR})


def main(arguments: list[str] | None = None) -> None:
    """Checks, measures, prints, and keeps the rows if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python tools/bench/server.py --rounds 20 --json server.json",
    )  # fmt: skip
    parser.add_argument("--parameters", type=int, default=25_000_000, help="numbers in a vector")
    parser.add_argument("--rounds", type=int, default=15, help="timings, of which the median is taken")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, as a server has by default")
    parser.add_argument("--quick", action="store_true", help="two rounds on a million parameters")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows and how they came about")
    options = parser.parse_args(arguments)
    numel, rounds = (1_000_000, 2) if options.quick else (options.parameters, options.rounds)
    torch.set_num_threads(options.threads)
    check(numel)
    rows = measured(numel, rounds)
    cells = [[row["pass"], str(row["megabytes_moved"]), *(f"{row[k]:.3g}" for k in COLUMNS[2:])] for row in rows]
    show_table(COLUMNS, cells, f"{VECTORS} gradients of {4 * numel / 1e6:g} MB, {options.threads} thread")
    if options.json:
        keep_rows(options.json, rows, {
            "date": datetime.date.today().isoformat(), "parameters": numel, "vectors": VECTORS, "rounds": rounds,
            "threads": options.threads, "cpus": os.cpu_count(), "torch": torch.__version__,
        })  # fmt: skip


if __name__ == "__main__":
    as_in_a_server()
    main()
