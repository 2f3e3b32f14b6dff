"""Memory of a run on a large model: three steps of MAML over Ray with two workers and a server of four shards.

By default a network of 250 million parameters, 1 GB. What every kind of process holds is sampled while it runs: its own
memory, and what they share, which are areas where gradients and weights lie, and the object store. It is printed in
gigabytes and in copies of the parameters, beside the copies that the design accounts for; 0.2 GB of every process are
Python and torch.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.bench._tables import keep_rows, show_table  # noqa: E402

KINDS = {"ray::Worker": "worker", "ray::Shard": "server shards"}
SHARED = {"areas": "memfd:metadist", "object store": "/plasma"}
"""Files in memory that processes share, by what their names have in them."""
ACCOUNTS: dict[str, tuple[float, str]] = {
    "driver": (4, "a snapshot (weights, two moments) on its way to disk; at the start a module and its copy"),
    "server shards": (5, "parameters, Adam's two moments, the sum of gradients; moments joined once"),
    "worker": (6.5, "parameters; two sums of earlier microbatches; adapted ones, a gradient, a Hessian product"),
    "areas": (3, "weights; a gradient of each worker"),
    "object store": (3, "a snapshot"),
}  # fmt: skip


class Memory:
    """Samples the memory of a process and all below it, by kind.

    Attributes:
        peaks: bytes at the most, by kind; of ``worker`` the largest process, of the others all together.
        most: bytes at the most of all together, the object store once.
        processes: how many of a kind there were at the most.
    """

    def __init__(self, root: int) -> None:
        self._root, self._stop = root, threading.Event()
        self.peaks: dict[str, int] = {}
        self.processes: dict[str, int] = {}
        self.most = 0
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends sampling."""
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.05):
            now: dict[str, list[int]] = {}
            files: dict[str, dict[int, int]] = {kind: {} for kind in SHARED}
            for kind, own, pid in _tree(self._root):
                now.setdefault(kind, []).append(own)
                for what, number, size in _open_memory(pid):
                    files[what][number] = size
            shared = {what: sum(sizes.values()) for what, sizes in files.items()}
            total = sum(map(sum, now.values())) + sum(shared.values())
            self.most = max(self.most, total)
            for kind, sizes in now.items():
                size = max(sizes) if kind == "worker" else sum(sizes)
                self.peaks[kind] = max(self.peaks.get(kind, 0), size)
                self.processes[kind] = max(self.processes.get(kind, 0), len(sizes))
            for kind, size in shared.items():
                self.peaks[kind] = max(self.peaks.get(kind, 0), size)


def _tree(root: int) -> Iterator[tuple[str, int, int]]:
    """Kind, bytes of its own memory, and number, of a process and all below it."""
    parents, words = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                words[int(entry.name)] = (entry / "cmdline").read_text()
            except (OSError, ValueError, IndexError):
                continue
    for pid in parents:
        above = pid
        while above in parents and above != root:
            above = parents[above]
        if above != root:
            continue
        try:
            status = (Path("/proc") / str(pid) / "status").read_text()
        except OSError:
            continue
        sizes = {
            line.split(":")[0]: int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("Rss")
        }
        kind = next((k for start, k in KINDS.items() if words[pid].startswith(start)), "")
        kind = kind or ("driver" if pid == root else "other")
        yield kind, sizes.get("RssAnon", 0), pid


def _open_memory(pid: int) -> Iterator[tuple[str, int, int]]:
    """Of each file in memory that a process has open what it is, its number, and how many bytes of it there are."""
    with contextlib.suppress(OSError):
        for entry in (Path("/proc") / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                name, found = os.readlink(entry), entry.stat()
                for what, mark in SHARED.items():
                    if mark in name:
                        yield what, found.st_ino, 512 * found.st_blocks


def run(
    parameters: int, layers: int, workers: int, shards: int, steps: int, folder: Path
) -> tuple[Memory, dict[str, Any]]:
    """Trains, watched; the memory and the summary."""
    width = round(math.sqrt(parameters / layers))
    words = {
        "model": f"{{type: mlp, hidden: {[width] * (layers + 1)}}}",
        "algorithm": "{type: maml, inner_lr: 1e-3, inner_steps: 1}",
        "outer": f"{{steps: {steps}, meta_batch_size: {2 * workers}, tasks_per_microbatch: 1, lr: 1e-5}}",
        "runtime": f"{{type: ray, workers: {workers}, server_shards: {shards}}}", "engine.compile": "false",
        "evaluation.episodes": "4", "checkpoint.every": str(10 * steps), "tracking.wandb.mode": "disabled",
    }  # fmt: skip
    command = [sys.executable, "-m", "metadist.cli", "train", str(ROOT / "configs" / "sinusoid_maml.yaml")]
    command += [f"{k}={v}" for k, v in words.items()] + ["--run-dir", str(folder / "run")]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        memory = Memory(process.pid)
        code = process.wait()
        memory.stop()
        if code:
            log.seek(0)
            raise SystemExit(f"the run ended with {code}:\n{log.read()}")
    return memory, json.loads((folder / "run" / "summary.json").read_text())


def rows_of(memory: Memory, parameters: int) -> list[dict[str, Any]]:
    """A row for each kind of process."""
    rows = []
    for kind, (copies, by) in ACCOUNTS.items():
        peak = memory.peaks.get(kind, 0)
        rows.append({
            "what": kind, "processes": memory.processes.get(kind, 1), "peak_gb": peak / 1e9,
            "copies": peak / (4 * parameters), "accounted_for": copies, "by": by,
        })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Runs, prints, and keeps the rows if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python tools/bench/large_model.py --parameters 250000000 --json large.json",
    )  # fmt: skip
    parser.add_argument("--parameters", type=int, default=250_000_000)
    parser.add_argument("--layers", type=int, default=10, help="over which the parameters are spread evenly")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="ten million parameters")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows and how they came about")
    options = parser.parse_args(arguments)
    parameters = 10_000_000 if options.quick else options.parameters
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        memory, summary = run(parameters, options.layers, options.workers, options.shards, options.steps, Path(folder))
    rows = rows_of(memory, parameters)
    cells = [
        [r["what"], *(f"{r[k]:.3g}" for k in ("peak_gb", "copies", "accounted_for", "processes")), r["by"]]
        for r in rows
    ]
    title = f"{parameters / 1e6:g} M parameters, {4 * parameters / 1e9:.2f} GB, {summary['version']} steps"
    show_table(("what", "peak GB", "copies", "accounted for", "processes", "by"), cells, title)
    print(f"all together at the most {memory.most / 1e9:.2f} GB, in {time.monotonic() - began:.0f} s")
    if options.json:
        keep_rows(options.json, rows, {
            "date": datetime.date.today().isoformat(), "parameters": parameters, "layers": options.layers,
            "workers": options.workers, "shards": options.shards, "most_gb": memory.most / 1e9, "cpus": os.cpu_count(),
        })  # fmt: skip


if __name__ == "__main__":
    main()
