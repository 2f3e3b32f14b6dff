"""Faults for live runs: which process to strike, and when."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

WORKERS = ("ray::Worker", "ray::_Member")
SERVERS = ("ray::Shard",)


def steps_of(run_dir: Path) -> int:
    """Steps that a run has written down."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen | None = None) -> None:
    """Waits until a run has made a step; fails if ``process`` ends before."""
    for _ in range(4000):
        if steps_of(run_dir) >= step:
            return
        assert process is None or process.poll() is None, "the run ended before the fault could be injected"
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came")


@contextlib.contextmanager
def struck(
    run_dir: Path, step: int, kinds: tuple[str, ...] = WORKERS, fault: int = signal.SIGKILL
) -> Iterator[list[int]]:
    """An actor of a run in this process gets a signal when a step is made; its process, once it has."""
    found: list[int] = []

    def strike() -> None:
        wait_for_step(run_dir, step)
        found.append(actors_of(os.getpid(), kinds)[0])
        os.kill(found[0], fault)

    striker = threading.Thread(target=strike)
    striker.start()
    try:
        yield found
    finally:
        striker.join()


def actors_of(driver: int, kinds: tuple[str, ...]) -> list[int]:
    """The processes of a driver's Ray actors of some kinds; of whichever cluster it has started."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    parent = {pid: ppid for pid, ppid, *_ in rows}

    def descends(pid: str) -> bool:
        while pid in parent and pid != str(driver):
            pid = parent[pid]
        return pid == str(driver)

    found = [int(pid) for pid, _, args in (r for r in rows if len(r) == 3) if args.startswith(kinds) and descends(pid)]
    assert found, f"no process of {kinds} was found"
    return sorted(found)


def alive(pid: int) -> bool:
    """Whether a process is there, and not merely waiting to be buried."""
    return state_of(pid) not in ("", "Z")


def state_of(pid: int) -> str:
    """What the system says of a process, e.g. ``T`` if it is stopped; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
