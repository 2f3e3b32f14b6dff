"""Measuring: first whether an implementation is right, then how long it takes and how much memory."""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from metadist.benchmark import distance
from metadist.device import make_repeatable, wait_for
from metadist.errors import first_line
from metadist.inner.memory import peak_bytes, trim
from tools.bench.adaptation_parts.ours import SETTINGS, make_ours
from tools.bench.adaptation_parts.peers import PEERS, make_peer
from tools.bench.adaptation_parts.workloads import (
    DTYPES,
    Call,
    Job,
    Tensors,
    Workload,
    flops_of_a_task,
    make_job,
    reference,
)

FLOAT64_TOLERANCE, FLOAT32_TOLERANCE = 1e-7, 5e-2
"""Largest distance from the reference, over the length of the reference, all meta-parameters as one vector.

Networks with ReLU and max pooling have kinks, at which rounding decides in float32. So five times the reference's
own distance, float32 from float64, is added there; one inner step more or a missing second order are much farther.
"""

LEAST_S = 0.2
"""A round calls the shorter implementations again until this much time is measured."""


@dataclass(frozen=True)
class Implementation:
    """Whatever computes a workload's meta-gradient.

    Args:
        name: in the results.
        make: from a job to the call that is timed.
        ours: whether it is this package's.
        compiled: whether its first call compiles.
        together: tasks computed in one call, where that is a choice.
    """

    name: str
    make: Callable[[Job], Call]
    ours: bool = False
    compiled: bool = False
    together: int | None = None


@dataclass
class Measured:
    """What was found out of one implementation; ``reason`` says what was wrong if something was."""

    implementation: Implementation
    call: Call | None = None
    reason: str = ""
    first_call_s: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    rounds_s: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of a call of processor time and by the wall clock, the median of each round."""

    def milliseconds(self, clock: int) -> float:
        """Of a call: processor time (0) or time by the wall clock (1), the median over rounds."""
        return 1000 * statistics.median(r[clock] for r in self.rounds_s)


def implementations(
    workload: Workload, folder: Path, quick: bool = False, words: tuple[str, ...] = (), device: str = "cpu"
) -> tuple[list[Implementation], dict[str, str]]:
    """Those of a workload, ours after the peers, and why others are left out.

    Args:
        workload: what is computed.
        folder: where peers are installed.
        quick: of ours, only those that are quick to measure here.
        words: only those of these names, or whose name contains a word that is no name; none given: all.
        device: where it is computed.
    """
    found, left_out = [], {}
    for peer in PEERS:
        if not _wanted(peer.name, words):
            continue
        if why := peer.reason(workload.family):
            left_out[peer.name] = why
        else:
            found.append(Implementation(peer.name, lambda job, p=peer: make_peer(p, job, folder)))  # type: ignore[misc]
    for s in SETTINGS:
        name = f"metadist/{s.name}"
        here = workload.family in s.on and device in s.where
        if here and (not quick or workload.name in s.quick) and _wanted(name, words):
            make = lambda job, s=s: make_ours(s, job)  # noqa: E731
            found.append(Implementation(name, make, True, s.compiled, s.together))  # type: ignore[arg-type]
    return found, left_out


_NAMES = {p.name for p in PEERS} | {f"metadist/{s.name}" for s in SETTINGS}


def _wanted(name: str, words: tuple[str, ...]) -> bool:
    return not words or any(word == name or (word not in _NAMES and word.lower() in name.lower()) for word in words)


# ------------------------------------------------------------------ right or wrong


@dataclass(frozen=True)
class Check:
    """What an implementation has to give for a job.

    Args:
        job: the job.
        wanted: the reference, in float64.
        tolerance: of the distance from it.
    """

    job: Job
    wanted: Tensors
    tolerance: float


def checks(workload: Workload, tasks: int, device: str = "cpu") -> tuple[Check, Check]:
    """On the job that is timed, in float32, and on a few tasks in float64."""
    timed = make_job(workload, tasks, torch.float32, device)
    wanted = reference(make_job(workload, tasks, torch.float64, device))
    small = make_job(workload, min(tasks, workload.check_tasks), torch.float64, device)
    rounding = distance(reference(timed), wanted)
    return (
        Check(timed, wanted, FLOAT32_TOLERANCE + 5 * rounding),
        Check(small, reference(small), FLOAT64_TOLERANCE),
    )


def check(implementation: Implementation, timed: Check, small: Check, quick: bool = False) -> Measured:
    """Makes the first calls of an implementation and compares what they give.

    Args:
        implementation: which.
        timed: the job that will be timed.
        small: a few tasks in float64; what a compiled setting has traced is run there without the compiler.
        quick: leave that out for compiled settings.
    """
    result = Measured(implementation)
    gc.collect()  # graphs in cycles, of what was checked before
    trim()  # our allocator settings would keep its pages for good
    try:
        result.call = implementation.make(timed.job)
        started = time.perf_counter()
        found = result.call()
        wait_for(torch.device(timed.job.device))
        result.first_call_s = time.perf_counter() - started
        _judge(result, found, timed)
        if not result.reason and not (implementation.compiled and quick):
            with torch.compiler.set_stance("force_eager"):
                found = implementation.make(small.job)()
            _judge(result, found, small)
    except ImportError as e:
        result.reason = str(e)
    except Exception as e:
        result.reason = f"failed ({type(e).__name__}: {first_line(e)[:200]})"
    if result.reason:
        result.call = None
    return result


def _judge(result: Measured, found: Tensors, of: Check) -> None:
    name, error = DTYPES[of.job.dtype], distance(found, of.wanted)
    result.errors[name] = error
    if not error <= of.tolerance:
        result.reason = (
            f"WRONG: its meta-gradient is {error:.1e} from the reference in {name}, more than {of.tolerance:.0e}"
        )


# ------------------------------------------------------------------ time


def time_rounds(measured: list[Measured], rounds: int, device: str = "cpu") -> None:
    """Interleaved rounds: each implementation in turn, another one first in each round."""
    ready = [m for m in measured if m.call is not None]
    repeats = [_repeats(m, device) for m in ready]
    order = list(zip(ready, repeats, strict=True))
    for _ in range(rounds):
        for m, times in order:
            assert m.call is not None
            gc.collect()
            calls = [_seconds(m.call, device) for _ in range(times)]
            m.rounds_s.append((statistics.median(c for c, _ in calls), statistics.median(w for _, w in calls)))
        order = order[1:] + order[:1]


def _repeats(measured: Measured, device: str) -> int:
    if measured.first_call_s > 5 * LEAST_S and not measured.implementation.compiled:
        return 1
    assert measured.call is not None
    return min(50, 1 + int(LEAST_S / max(_seconds(measured.call, device))))


def _seconds(call: Call, device: str) -> tuple[float, float]:
    """Processor time of one call, all threads together, and its time by the wall clock; on a GPU the latter twice."""
    started, processor = time.perf_counter(), time.process_time()
    call()
    wait_for(torch.device(device))
    wall = time.perf_counter() - started
    return time.process_time() - processor if device == "cpu" else wall, wall


def attainable(device: str = "cpu") -> dict[str, float]:
    """Billions of floating-point operations a second of this machine, at its best of a few tries.

    On one thread of a CPU; on a GPU in single precision, without the units that round.
    """
    n, pictures = (1024, 16) if device == "cpu" else (8192, 1024)
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    x, weight = torch.randn(pictures, 64, 28, 28, device=device), torch.randn(64, 64, 3, 3, device=device)
    with torch.no_grad():
        gemm = min(_seconds(lambda: {"": a @ b}, device)[0] for _ in range(5))
        conv = min(_seconds(lambda: {"": F.conv2d(x, weight, padding=1)}, device)[0] for _ in range(8))
    return {"sgemm": 2 * n**3 / gemm / 1e9, "conv3x3": 2 * 9 * 64 * 64 * pictures * 28 * 28 / conv / 1e9}


# ------------------------------------------------------------------ memory


def peak_mb(implementation: Implementation, job: Job) -> float:
    """Growth of this process's largest size over two calls, in MB; for a process that does nothing else.

    On a GPU: of what tensors take there.
    """
    call = implementation.make(job)
    if job.device != "cpu":
        held = torch.cuda.memory_allocated()
        call()
        call()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    before = _largest_mb()
    call()
    call()
    return _largest_mb() - before


def held_mb(implementation: Implementation, job: Job) -> float:
    """What tensors take at most in a call that is not the first, which may trace; in MB."""
    call = implementation.make(job)
    call()
    return peak_bytes(call) / 1e6


def _largest_mb() -> float:
    # Not ru_maxrss where there is a choice: a process inherits it from the one that started it.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        scale = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


# ------------------------------------------------------------------ all of it


def measure(
    workload: Workload,
    found: list[Implementation],
    tasks: int,
    rounds: int,
    quick: bool = False,
    say: Callable[[str], None] = lambda _: None,
    device: str = "cpu",
) -> dict[str, Any]:
    """One workload by all its implementations, in this process: its rows, and what was left out and why."""
    make_repeatable(torch.device(device))
    timed, small = checks(workload, tasks, device)
    best = attainable(device)
    measured = []
    for implementation in found:
        m = check(implementation, timed, small, quick)
        measured.append(m)
        say(f"{workload.name} {implementation.name}: {m.reason or f'right, first call {m.first_call_s:.1f} s'}")
    time_rounds(measured, rounds, device)
    best = {k: max(best[k], v) for k, v in attainable(device).items()}
    return {
        "rows": rows(workload, measured, tasks, flops_of_a_task(workload), best["sgemm"]),
        "left_out": {m.implementation.name: m.reason for m in measured if m.reason},
        "attainable_gflops": best,
        "tolerances": {DTYPES[c.job.dtype]: c.tolerance for c in (timed, small)},
    }


def rows(workload: Workload, measured: list[Measured], tasks: int, flops: float, sgemm: float) -> list[dict[str, Any]]:
    """A row for each implementation that was timed."""
    done = [m for m in measured if m.rounds_s]
    ms, wall = ({m.implementation.name: m.milliseconds(clock) / tasks for m in done} for clock in (0, 1))
    peers = [ms[m.implementation.name] for m in done if not m.implementation.ours]
    made = []
    for m in done:
        i, own = m.implementation, ms[m.implementation.name]
        gflops = flops / own / 1e6
        made.append({
            "workload": workload.name, "implementation": i.name, "ms_per_task": own,
            "ratio_to_fastest_peer": min(peers) / own if i.ours and peers else None,
            "wall_ms_per_task": wall[i.name], "tasks": tasks, "tasks_together": i.together,
            "rounds": len(m.rounds_s), "first_call_s": m.first_call_s, "peak_mb": None,
            "gflops": gflops, "share_of_sgemm": gflops / sgemm,
            "error_float32": m.errors["float32"], "error_float64": m.errors.get("float64"),
        })  # fmt: skip
    return made
