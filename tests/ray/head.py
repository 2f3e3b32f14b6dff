"""A Ray head of its own: started, waited for, and stopped without touching any other on the machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}
BINARIES = str(Path(sys.executable).parent)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**variables: str) -> dict[str, str]:
    """This process's, with our Python first on the path and no word of another cluster."""
    own = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    return {**own, "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **variables}


@dataclass
class Head:
    """A head and the nodes that have joined it.

    Attributes:
        url: of its dashboard.
        address: for ``ray.init``.
    """

    url: str
    address: str
    variables: dict[str, str]
    processes: list[subprocess.Popen] = field(default_factory=list)

    def metadist(self, *words: str, cwd: Path = ROOT, timeout: float = 200, **variables: str) -> Any:
        """Runs our command line."""
        return subprocess.run(
            [sys.executable, "-m", "metadist.cli", *words], cwd=cwd, timeout=timeout, capture_output=True, text=True,
            env=environment(**{**self.variables, **variables}),
        )  # fmt: skip

    def join(self, *flags: str, before: str = "", **variables: str) -> subprocess.Popen:
        """A node joins.

        Args:
            flags: of ``ray start``.
            before: shell commands, run in a mount namespace of the node's own.
            variables: of the environment of its processes.
        """
        words = [f"{BINARIES}/ray", "start", "--address", self.address, "--block", "--disable-usage-stats",
                 "--node-ip-address", "127.0.0.1", "--dashboard-agent-listen-port", str(free_port()),
                 *flags]  # fmt: skip
        if before:
            words = ["unshare", "--mount", "sh", "-c", f'{before} && exec "$@"', "sh", *words]
        return self._start(words, variables)

    def _start(self, words: Sequence[str], variables: dict[str, str]) -> subprocess.Popen:
        process = subprocess.Popen(
            words, env=environment(**{**self.variables, **variables}), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.processes.append(process)
        return process


@contextlib.contextmanager
def ray_head(*flags: str, cpus: int = 3, **variables: str) -> Iterator[Head]:
    """A head with a dashboard; every port its own, since another Ray may be running on this machine."""
    port, dashboard = free_port(), free_port()
    words = {
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "node-ip-address": "127.0.0.1",
        "num-cpus": cpus,
    }
    head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", {**NO_TOKEN, **variables})
    given = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    process = head._start(
        [f"{BINARIES}/ray", "start", "--head", "--block", "--disable-usage-stats", *given, *flags], {}
    )
    try:
        for _ in range(480):
            assert process.poll() is None, "the head did not start"
            if _answers(head.url):
                break
            time.sleep(0.25)
        yield head
    finally:
        for started in reversed(head.processes):
            _end(started)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=2).read()
    except urllib.error.HTTPError:
        return True  # it wants a token
    except OSError:
        return False
    return True


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
