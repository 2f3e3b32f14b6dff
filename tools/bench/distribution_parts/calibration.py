"""What messages cost, measured as CPU seconds of the processes of a run; and how fast this machine moves memory."""

from __future__ import annotations

import os
import socket
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from metadist.simulator import Costs, Machine
from tools.bench import server
from tools.bench.distribution_parts.emulated import EmulatedRun

WARM_UP, SHARDS = 4, 4
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> dict[str, float]:
    """CPU seconds so far of this process, ``driver``, and of those it started, by what they are.

    ``worker``, ``server``, and ``services``: what Ray itself runs beside them.
    """
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        parents[int(folder.name)], used[int(folder.name)] = int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS
    found = {"driver": time.process_time(), "worker": 0.0, "server": 0.0, "services": 0.0}
    for pid in parents:
        if pid != os.getpid() and _descends(pid, parents):
            found[_kind(pid)] += used[pid]
    return found


def _descends(pid: int, parents: dict[int, int]) -> bool:
    while pid > 1 and pid != os.getpid():
        pid = parents.get(pid, 0)
    return pid == os.getpid()


def _kind(pid: int) -> str:
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "services"
    actors = {b"ray::Worker": "worker", b"ray::Shard": "server"}
    return next((kind for start, kind in actors.items() if title.startswith(start)), "services")


@dataclass(frozen=True)
class Measured:
    """Of steps with so many workers.

    Args:
        workers: how many, with a microbatch each.
        step_s: seconds of a step, the median.
        cpu_s: CPU seconds of a step, the mean, by kind of process.
    """

    workers: int
    step_s: float
    cpu_s: dict[str, float]


def measured_steps(workers: int, seconds: float, steps: int, shards: int = 1) -> Measured:
    """Steps whose workers wait for ``seconds``, once they are warm."""
    run = EmulatedRun("conv4", workers, seconds=seconds, shards=shards)
    try:
        run.steps(WARM_UP)
        before = cpu_seconds()
        times = run.steps(steps)
        after = cpu_seconds()
    finally:
        run.close()
    return Measured(workers, statistics.median(times), {k: (after[k] - before[k]) / steps for k in after})


def costs_of(few: Measured, many: Measured, cut: Measured | None = None, message_s: float = 0.0) -> Costs:
    """Costs of messages, from CPU seconds with two numbers of workers: what grows with them is a lease's.

    The driver's are halved between lease and answer. What Ray runs beside the workers is theirs. Workers do nothing
    but leases; what one of these takes more with many workers than with few is the crowd's.

    Args:
        few, many: steps with a server of one shard.
        cut: steps as ``many``, with :data:`SHARDS` shards; None: what these cost is left at nothing.
        message_s: CPU seconds of a message over a socket.
    """

    def each(kind: str) -> float:
        return max(0.0, (many.cpu_s[kind] - few.cpu_s[kind]) / (many.workers - few.workers))

    def fixed(kind: str) -> float:
        return max(0.0, few.cpu_s[kind] - few.workers * each(kind))

    driver = each("driver")
    alone, crowded = (m.cpu_s["worker"] / m.workers for m in (few, many))
    crowd_s = max(0.0, crowded - alone) / (many.workers - few.workers)

    def part(*kinds: str) -> float:
        more = 0.0 if cut is None else sum(cut.cpu_s[k] - many.cpu_s[k] for k in kinds)
        return max(0.0, more / ((SHARDS - 1) * many.workers))

    return Costs(
        lease_s=driver / 2, answer_s=driver / 2, part_s=part("driver"), step_s=fixed("driver"),
        worker_s=max(0.0, alone - crowd_s * (few.workers - 1)) + each("services"), crowd_s=crowd_s,
        worker_part_s=part("worker", "services"),
        add_s=each("server"), commit_s=fixed("server"), message_s=message_s,
    )  # fmt: skip


def machine() -> tuple[Machine, float]:
    """How fast this machine is, and the CPU seconds of a message over a socket. Ray has to be there."""
    sums, update = server.measured(25_000_000, 3)
    tcp, message_s = _socket_speeds()
    cores = os.cpu_count() or 1
    rates = Machine(
        cores=cores, copy_bytes_per_s=_put_speed(), sum_bytes_per_s=1e9 * sums["gb_per_s"],
        updates_per_s=1e9 * update["gb_per_s"] / (7 * 4), threads=min(cores, 8), tcp_bytes_per_s=tcp,
    )  # fmt: skip
    return rates, message_s


def _put_speed() -> float:
    """Bytes a second into the object store, where its memory has been touched before: as in a run that is warm."""
    array = np.ones(25_000_000, np.float32)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        ref = ray.put(array)
        times.append(time.perf_counter() - start)
        del ref
        time.sleep(0.05)  # until its memory is free for the next
    return array.nbytes / min(times)


def _socket_speeds() -> tuple[float, float]:
    """Bytes that a core sends or receives in a second, and its seconds for a message of a byte."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        a = socket.create_connection(listening.getsockname())
        b, _ = listening.accept()
    for end in (a, b):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    big, small = 1 << 28, 2000
    block = memoryview(bytearray(1 << 20))

    def send() -> None:
        for _ in range(big // len(block)):
            a.sendall(block)

    def receive() -> None:
        left, into = big, bytearray(1 << 20)
        while left:
            left -= b.recv_into(into)

    def echo() -> None:
        for _ in range(small):
            b.sendall(b.recv(1))

    def ask() -> None:
        for _ in range(small):
            a.sendall(b"x")
            a.recv(1)

    with a, b:
        return 2 * big / _cpu_of(send, receive), _cpu_of(ask, echo) / (4 * small)


def _cpu_of(*parts: Callable[[], None]) -> float:
    start = time.process_time()
    threads = [threading.Thread(target=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.process_time() - start


def calibrated(seconds: float, steps: int, counts: tuple[int, int]) -> dict[str, Any]:
    """Costs and machine, and the measurements they are from. Ray has to be there."""
    few, many = (measured_steps(n, seconds, steps) for n in counts)
    cut = measured_steps(counts[1], seconds, steps, SHARDS)
    rates, message_s = machine()
    costs = costs_of(few, many, cut, message_s)
    return {"costs": asdict(costs), "machine": asdict(rates), "steps": [asdict(m) for m in (few, many, cut)]}
