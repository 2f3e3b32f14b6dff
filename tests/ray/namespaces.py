"""Nodes of a Ray cluster in network namespaces of their own, and the wire between them: slow, lossy, or cut.

The wire is this process: every namespace has a TUN device, and what one sends is read here and given to the other's
after a delay, or lost. So it needs no traffic control in the kernel, only the right to make namespaces.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.ray.head import BINARIES, NO_TOKEN, environment

_TUNSETIFF, _TUN_WITHOUT_HEADER, _MTU = 0x400454CA, 0x1001, 9000
_PORT = 6379
_SOON = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 4,
         "health_check_initial_delay_ms": 1000}  # fmt: skip


def why_not() -> str:
    """Why this machine has no network namespaces for us; empty if it has."""
    try:
        with open("/dev/net/tun", "rb"):
            pass
        done = subprocess.run(["ip", "netns", "add", f"{_name(0)}t"], capture_output=True, text=True)
        subprocess.run(["ip", "netns", "delete", f"{_name(0)}t"], capture_output=True)
    except OSError as e:
        return f"network namespaces want rights that are not here: {e}"
    return done.stderr.strip() and f"network namespaces want rights that are not here: {done.stderr.strip()}"


def _name(node: int) -> str:
    return f"metadist{os.getpid()}n{node}"


def address(node: int) -> str:
    """Of a node on the wire."""
    return f"10.231.0.{node + 1}"


class Wire(threading.Thread):
    """Carries packets between nodes.

    Args:
        nodes: how many.
        delay_s: seconds that each packet takes.
        loss: the part of the packets that do not arrive.

    Attributes:
        cut: nodes that nothing comes from and nothing goes to.
        carried, lost: packets so far; what a cut stops is neither.
    """

    def __init__(self, nodes: int, delay_s: float = 0.0, loss: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.delay_s, self.loss = delay_s, loss
        self.cut: set[int] = set()
        self.carried = self.lost = 0
        self._random, self._ended = random.Random(0), threading.Event()
        self._ends = [self._end(node) for node in range(nodes)]

    @staticmethod
    def _end(node: int) -> int:
        """The TUN device of a namespace that is made for it."""
        device = f"mdtun{node}"
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _TUN_WITHOUT_HEADER))
        inside = ["ip", "-n", _name(node)]
        for words in (
            ["ip", "netns", "add", _name(node)], ["ip", "link", "set", device, "netns", _name(node)],
            [*inside, "link", "set", "lo", "up"], [*inside, "link", "set", device, "mtu", str(_MTU), "up"],
            [*inside, "address", "add", f"{address(node)}/24", "dev", device],
        ):  # fmt: skip
            subprocess.run(words, check=True, capture_output=True)
        return end

    def run(self) -> None:
        numbers = {socket.inet_aton(address(node)): node for node in range(len(self._ends))}
        ends = {end: node for node, end in enumerate(self._ends)}
        under_way: list[tuple[float, int, int, bytes]] = []
        count = itertools.count()
        while not self._ended.is_set():
            wait = min(0.1, max(0.0, under_way[0][0] - time.monotonic())) if under_way else 0.1
            for end in select.select(self._ends, [], [], wait)[0]:
                for packet in _read(end):
                    to = numbers.get(packet[16:20]) if packet[0] >> 4 == 4 else None
                    if to is None or self.cut & {to, ends[end]}:
                        continue
                    if self._random.random() < self.loss:
                        self.lost += 1
                        continue
                    self.carried += 1
                    heapq.heappush(under_way, (time.monotonic() + self.delay_s, next(count), to, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, to, packet = heapq.heappop(under_way)
                if to not in self.cut:
                    with contextlib.suppress(OSError):  # its queue is full, or its device goes
                        os.write(self._ends[to], packet)

    def close(self) -> None:
        """Ends it and takes its namespaces away."""
        self._ended.set()
        self.join()
        for node, end in enumerate(self._ends):
            os.close(end)
            subprocess.run(["ip", "netns", "delete", _name(node)], check=False, capture_output=True)


def _read(end: int) -> Iterator[bytes]:
    """What has come, up to some packets, so that none waits for all of another's."""
    for _ in range(64):
        try:
            yield os.read(end, 65536)
        except BlockingIOError:
            return


class Nodes:
    """A head, whose node has no room for workers, and nodes with a CPU each.

    Attributes:
        wire: between them.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire, self._started = wire, list[subprocess.Popen[bytes]]()

    def start(self, node: int) -> None:
        """Lets a node run Ray; number 0 is the head."""
        which = ["--head", "--port", str(_PORT), "--include-dashboard", "false", "--num-cpus", "0",
                 "--system-config", json.dumps(_SOON)]  # fmt: skip
        if node:
            which = ["--address", f"{address(0)}:{_PORT}", "--num-cpus", "1"]
        self._started.append(subprocess.Popen(
            [*self.at(node), f"{BINARIES}/ray", "start", "--block", "--disable-usage-stats",
             "--node-ip-address", address(node), *which],
            env=environment(**NO_TOKEN), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        ))  # fmt: skip

    @staticmethod
    def at(node: int) -> list[str]:
        """What to put before a command that is to run on a node."""
        return ["ip", "netns", "exec", _name(node)]

    def until_there(self, nodes: int) -> None:
        """Waits until Ray knows of so many."""
        asks = f"import ray; ray.init({address(0) + ':' + str(_PORT)!r}, log_to_driver=False); " \
               "print(sum(n['Alive'] for n in ray.nodes()))"  # fmt: skip
        told = ""
        for _ in range(30):
            told = subprocess.run(
                [*self.at(0), sys.executable, "-c", asks], env=environment(**NO_TOKEN), capture_output=True, text=True
            ).stdout.strip()
            if told == str(nodes):
                return
            time.sleep(1)
        raise AssertionError(f"of {nodes} nodes there are {told or 'none'}")

    def train(self, config: Path, run_dir: Path, options: dict[str, Any]) -> subprocess.Popen[str]:
        """A run whose driver is on the head's node, just started."""
        words = [f"{k}={v}" for k, v in {**options, "runtime.address": f"{address(0)}:{_PORT}"}.items()]
        command = [sys.executable, "-m", "metadist.cli", "train", str(config), *words, "--run-dir", str(run_dir)]
        return subprocess.Popen(
            [*self.at(0), *command], cwd=ROOT, env=environment(**NO_TOKEN),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def close(self) -> None:
        """Ends every process in the namespaces, whoever started it."""
        for node in range(len(self._started)):
            inside = subprocess.run(["ip", "netns", "pids", _name(node)], capture_output=True, text=True).stdout
            for pid in map(int, inside.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
        for process in self._started:
            process.wait()


@contextlib.contextmanager
def nodes(workers: int, delay_s: float = 0.0, loss: float = 0.0) -> Iterator[Nodes]:
    """A head and nodes for so many workers, one each, joined by a wire."""
    wire = Wire(workers + 1, delay_s, loss)
    made = Nodes(wire)
    try:
        wire.start()
        for node in range(workers + 1):
            made.start(node)
            made.until_there(node + 1)  # two that start at once may take the same socket file
        yield made
    finally:
        made.close()
        wire.close()
