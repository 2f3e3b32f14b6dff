"""Histories of faults on live runs, drawn from seeds: each fault is seen to fire, and each run must end the same.

A run is a process of its own, over Ray, with three workers on one node that it starts itself or on two nodes of a
cluster that the harness starts. A fault is fired when the run has made a step; what ends the run is followed by
``metadist resume``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.faults import SERVERS, WORKERS, actors_of, alive, state_of, steps_of
from tests.ray.several_nodes import cluster

# After the last fault there is time for everything to start again and for silence to be noticed.
STEPS, LAST_FAULT, EVERY, LEASE_TIMEOUT_S = 400, 100, 10, 3.0
CONFIG = ROOT / "configs" / "omniglot_5way1shot_maml.yaml"
OPTIONS = {
    "outer.steps": STEPS, "outer.schedule": "constant", "outer.meta_batch_size": 6, "outer.tasks_per_microbatch": 2,
    "model.filters": 4, "engine.compile": "false", "tasks.resident": "false", "evaluation.episodes": 20,
    "checkpoint.every": EVERY, "tracking.wandb.mode": "disabled", "runtime.type": "ray", "runtime.workers": 3,
    "runtime.lease_timeout_s": LEASE_TIMEOUT_S, "runtime.server_timeout_s": 10, "runtime.max_worker_restarts": 200,
    "runtime.max_server_restarts": 50,
}  # fmt: skip
KINDS = (
    "worker killed", "worker stopped for seconds", "worker stopped for good", "server killed", "server stopped",
    "driver killed", "driver killed inside a checkpoint", "driver killed, newest checkpoint cut", "driver told to stop",
    "shard cut",
)  # fmt: skip
NODE = "node killed"
_PATIENCE_S = 120.0


@dataclass
class Fault:
    """Something to be done to a run once it has made a step."""

    kind: str
    step: int


@dataclass
class Fired:
    """A fault that was seen to have fired: after how many seconds it was noticed, how many steps were made again."""

    kind: str
    noticed_s: float
    again: int


@dataclass
class History:
    """What one run went through, and what it ended with."""

    seed: int
    fired: list[Fired]
    sha256: str
    metrics: list[str]
    restarts: dict[str, int]
    seconds: float = 0.0


def schedule(seed: int, faults: int, kinds: Sequence[str] = KINDS) -> list[Fault]:
    """Faults of a history, in the order of their steps."""
    rng = random.Random(seed)
    steps = sorted(rng.sample(range(5, LAST_FAULT), faults))
    return [Fault(rng.choice(kinds), step) for step in steps]


def numbers(run_dir: Path) -> list[str]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({k: x[k] for k in ("version", "loss", "accuracy", "grad_norm")}) for x in lines]


class Disturbed:
    """A run and what is done to it.

    Args:
        shards: its data, which must be its own: it is damaged.
        run_dir: where it is kept.
        root: the process that its actors descend from; None: the run's own.
        changes: of its config.
    """

    def __init__(self, shards: Path, run_dir: Path, root: int | None = None, **changes: Any) -> None:
        self.shards, self.run_dir, self._root = shards, run_dir, root
        self._options = {**OPTIONS, "tasks.path": shards, **changes}
        self.lines: list[tuple[float, str]] = []
        self._resumed_at = 0
        self.process = self._start(["train", str(CONFIG), *self._words(), "--run-dir", str(run_dir)])

    # ----------------------------------------------------------------- the process

    def _words(self) -> list[str]:
        return [f"{k}={v}" for k, v in self._options.items()]

    def _start(self, arguments: Sequence[str], cut_write: int = 0) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "tests" / "chaos" / "driver.py"), *arguments],
            cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CHAOS_CUT_WRITE": str(cut_write)},
        )  # fmt: skip
        threading.Thread(target=self._listen, args=[process], daemon=True).start()
        return process

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.lines.append((time.monotonic(), line.rstrip()))

    def _resume(self, cut_write: int = 0) -> int:
        """Goes on, and waits until it has said from where; returns that step."""
        since = time.monotonic()
        self.process = self._start(["resume", str(self.run_dir)], cut_write)
        self._resumed_at = int(self._heard(since, rf"{STEPS} steps(?: from step (\d+))?,")[1] or 0)
        return self._resumed_at

    def _heard(self, since: float, pattern: str) -> tuple[float, str | None]:
        """When the run first said something, in seconds from ``since``, and the part in parentheses."""
        seen = 0
        while time.monotonic() - since < _PATIENCE_S:
            for at, line in self.lines[seen:]:
                found = re.search(pattern, line)
                if at >= since and found:
                    return at - since, found.group(1) if found.groups() else None
            seen = max(0, len(self.lines) - 1)
            if self.process.poll() is not None:
                time.sleep(0.2)  # its last words
                if not any(at >= since and re.search(pattern, line) for at, line in self.lines):
                    break
            time.sleep(0.02)
        raise AssertionError(f"the run never said {pattern!r}:\n" + self.said())

    def said(self) -> str:
        """The end of what the run has said."""
        return "\n".join(line for _, line in self.lines[-30:])

    def wait_for_step(self, step: int) -> None:
        """Waits until so many steps are made."""
        until = time.monotonic() + _PATIENCE_S
        while steps_of(self.run_dir) < step:
            assert self.process.poll() is None, f"the run ended before step {step}:\n{self.said()}"
            assert time.monotonic() < until, f"step {step} never came:\n{self.said()}"
            time.sleep(0.01)

    def finish(self) -> dict[str, Any]:
        """Waits for the run's end; its summary."""
        code = self.process.wait(timeout=_PATIENCE_S + STEPS)
        assert code == 0, f"the run ended with {code}:\n{self.said()}"
        return dict(json.loads((self.run_dir / "summary.json").read_text()))

    def end(self) -> None:
        """Ends whatever is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _actor(self, kinds: tuple[str, ...], rng: random.Random) -> int:
        until = time.monotonic() + 30
        while True:
            try:
                return rng.choice(actors_of(self._root or self.process.pid, kinds))
            except AssertionError:  # between two lives
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    # ----------------------------------------------------------------- faults

    def fire(self, fault: Fault, rng: random.Random) -> Fired:
        """Does it, sees that it is done, and waits until it is noticed."""
        self.wait_for_step(fault.step)
        deeds: dict[str, Callable[[random.Random], tuple[float, int]]] = {
            "worker killed": self._kill_worker,
            "worker stopped for seconds": self._pause_worker,
            "worker stopped for good": self._stop_worker,
            "server killed": lambda r: self._lose_server(r, signal.SIGKILL),
            "server stopped": lambda r: self._lose_server(r, signal.SIGSTOP),
            "driver killed": self._kill_driver,
            "driver killed inside a checkpoint": self._cut_checkpoint,
            "driver killed, newest checkpoint cut": self._kill_driver_and_cut,
            "driver told to stop": self._terminate_driver,
            "shard cut": self._cut_shard,
        }
        return Fired(fault.kind, *deeds[fault.kind](rng))

    def _kill_worker(self, rng: random.Random) -> tuple[float, int]:
        pid, since = self._actor(WORKERS, rng), time.monotonic()
        os.kill(pid, signal.SIGKILL)
        took, _ = self._heard(since, r"worker \d+ died")
        _until(lambda: not alive(pid), "a killed worker is gone")
        return took, 0

    def _pause_worker(self, rng: random.Random) -> tuple[float, int]:
        self.wait_for_step(self._resumed_at + 2)  # this life of the run has workers
        pid, since = self._stopped_worker(rng)
        seconds = rng.uniform(0.5, 2.0)
        before, took = steps_of(self.run_dir), None
        # One step more can have been finished before the signal; where nobody else is ready, nobody can take over.
        alone = self._this_life()[-1]["workers"] < 2
        while took is None and not alone or time.monotonic() - since < seconds:
            if took is None and steps_of(self.run_dir) >= before + 2:
                took = time.monotonic() - since
            assert state_of(pid) == "T", "the worker did not stay stopped"
            waited = time.monotonic() - since
            assert waited < 0.9 * LEASE_TIMEOUT_S, f"the others did not take over:\n{self.said()}"
            time.sleep(0.02)
        os.kill(pid, signal.SIGCONT)
        return took or 0.0, 0

    def _stopped_worker(self, rng: random.Random) -> tuple[int, float]:
        """A worker that a signal has stopped, and when it was sent."""
        pid, since = self._actor(WORKERS, rng), time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        _until(lambda: state_of(pid) == "T", "a signal stops the worker")
        return pid, since

    def _this_life(self) -> list[dict[str, Any]]:
        """The lines of the steps since the run was last resumed."""
        whole, _, _ = (self.run_dir / "metrics.jsonl").read_text().rpartition("\n")
        lines = [json.loads(line) for line in whole.splitlines()]
        return [line for line in lines if line["version"] > self._resumed_at]

    def _all_have_answered(self) -> bool:
        """Whether all workers are there, and each has computed something, if not always in the same step."""
        lines = self._this_life()
        there = set(lines[-1]["utilisation"])
        return len(there) == self._options["runtime.workers"] and there <= {w for x in lines for w in x["worker_s"]}

    def _stop_worker(self, rng: random.Random) -> tuple[float, int]:
        # Before its first answer a worker has six times as long, and the others may be done by then: all have answered.
        self.wait_for_step(self._resumed_at + 2)
        _until(self._all_have_answered, "all workers answer")
        pid, since = self._stopped_worker(rng)
        took, _ = self._heard(since, r"worker \d+ died \(silent")
        _until(lambda: not alive(pid), "a stopped worker is ended")
        return took, 0

    def _lose_server(self, rng: random.Random, fault: int) -> tuple[float, int]:
        pid, before = self._actor(SERVERS, rng), steps_of(self.run_dir)
        since = time.monotonic()
        os.kill(pid, fault)
        took, step = self._heard(since, r"parameter server .*going on from step (\d+)")
        _until(lambda: not alive(pid), "a lost server is ended")
        return took, max(0, before - int(step or 0))

    def _kill_driver(self, rng: random.Random) -> tuple[float, int]:
        before = self._driver_gone(signal.SIGKILL)
        return 0.0, max(0, before - self._resume())

    def _cut_checkpoint(self, rng: random.Random) -> tuple[float, int]:
        # The run is killed and resumed once, so that it comes to write with the fault in it.
        self._driver_gone(signal.SIGKILL)
        self._resume(cut_write=1)
        code = self.process.wait(timeout=_PATIENCE_S)
        assert code == -signal.SIGKILL, f"the checkpoint was not cut: {code}\n{self.said()}"
        assert list((self.run_dir / "checkpoints").glob(".*.partial")), "nothing was half written"
        before = steps_of(self.run_dir)
        again = max(0, before - self._resume())
        assert not list((self.run_dir / "checkpoints").glob(".*.partial")), "what was half written is left"
        return 0.0, again

    def _kill_driver_and_cut(self, rng: random.Random) -> tuple[float, int]:
        before = self._driver_gone(signal.SIGKILL)
        newest = max(p for p in (self.run_dir / "checkpoints").iterdir() if p.name.isdecimal())
        if newest.name == "00000000":
            return 0.0, max(0, before - self._resume())  # the only one there is
        victim = rng.choice(sorted(newest.iterdir()))
        os.truncate(victim, victim.stat().st_size // 2)
        since = time.monotonic()
        step = self._resume()
        self._heard(since, "passed over a damaged checkpoint.*" + re.escape(newest.name))
        assert step < int(newest.name)
        return 0.0, max(0, before - step)

    def _terminate_driver(self, rng: random.Random) -> tuple[float, int]:
        since = time.monotonic()
        before = self._driver_gone(signal.SIGTERM, wanted=128 + signal.SIGTERM)
        took = time.monotonic() - since
        return took, max(0, before - self._resume())

    def _cut_shard(self, rng: random.Random) -> tuple[float, int]:
        shard = rng.choice(sorted(self.shards.glob("*.tar")))
        whole = shard.read_bytes()
        before = self._driver_gone(signal.SIGKILL)
        os.truncate(shard, len(whole) // 2)
        since = time.monotonic()
        self.process = self._start(["resume", str(self.run_dir)])
        took, _ = self._heard(since, "metadist: .*" + re.escape(shard.name))
        assert self.process.wait(timeout=_PATIENCE_S) == 1
        shard.write_bytes(whole)
        return took, max(0, before - self._resume())

    def _driver_gone(self, fault: int, wanted: int | None = None) -> int:
        """Ends the driver, and waits for the last of its actors; the steps it had made."""
        mine = [] if self._root else actors_of(self.process.pid, (*WORKERS, *SERVERS))
        self.process.send_signal(fault)
        code = self.process.wait(timeout=60)
        assert code == (-fault if wanted is None else wanted), f"the driver ended with {code}:\n{self.said()}"
        _until(lambda: not any(alive(pid) for pid in mine), "the driver's actors end with it")
        return steps_of(self.run_dir)


def _until(wanted: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not wanted():
        assert time.monotonic() < until, f"{what}: not after {seconds:g} s"
        time.sleep(0.02)


# --------------------------------------------------------------------------- histories


def history(seed: int, shards: Path, folder: Path, faults: int, nodes: int = 1) -> History:
    """One run with faults, all of them drawn from the seed."""
    began = time.monotonic()
    mine = folder / f"data-{seed}"
    shutil.copytree(shards, mine)
    rng = random.Random(seed + 1_000_000)
    with contextlib.ExitStack() as stack:
        changes: dict[str, Any] = {}
        root = None
        if nodes > 1:
            address, kill_node = stack.enter_context(_two_nodes())
            root, changes = os.getpid(), {"runtime.address": address}
        run = Disturbed(mine, folder / f"run-{seed}", root, **changes)
        stack.callback(run.end)
        fired = []
        for fault in schedule(seed, faults):
            fired.append(run.fire(fault, rng))
            if nodes > 1 and len(fired) == (faults + 1) // 2:
                since, before = time.monotonic(), steps_of(run.run_dir)
                kill_node()
                took, _ = run._heard(since, r"worker \d+ died")
                run.wait_for_step(min(STEPS, before + 5))
                fired.append(Fired(NODE, took, 0))
        summary = run.finish()
    shutil.rmtree(mine)
    return History(
        seed, fired, summary["meta_params_sha256"], numbers(run.run_dir), summary["restarts"], time.monotonic() - began
    )


@contextlib.contextmanager
def _two_nodes() -> Iterator[tuple[str, Callable[[], None]]]:
    """A head with room for the driver's server and two workers, and a node for a third, which can be killed."""
    with cluster(head_cpus=2) as made:
        other = [made.add_node(num_cpus=2)]

        def kill() -> None:
            made.remove_node(other.pop(), allow_graceful=False)
            made.add_node(num_cpus=2)

        yield made.address, kill


@dataclass
class Row:
    """What is told of one kind of fault."""

    kind: str
    noticed: list[float] = field(default_factory=list)
    again: list[int] = field(default_factory=list)


def table(histories: Sequence[History]) -> str:
    """Faults by kind: how many, when noticed, what they cost in steps made again."""
    rows: dict[str, Row] = {}
    for fired in (f for h in histories for f in h.fired):
        row = rows.setdefault(fired.kind, Row(fired.kind))
        row.noticed.append(fired.noticed_s)
        row.again.append(fired.again)
    lines = ["| fault | fired | noticed after, median (most) | steps made again, median (most) |", "|---|---|---|---|"]
    for kind in (k for k in (*KINDS, NODE) if k in rows):
        row = rows[kind]
        noticed, again = sorted(row.noticed), sorted(row.again)
        shown = f"{noticed[len(noticed) // 2]:.1f} s ({noticed[-1]:.1f})" if noticed[-1] else "-"
        lines.append(f"| {kind} | {len(noticed)} | {shown} | {again[len(again) // 2]} ({again[-1]}) |")
    return "\n".join(lines)
