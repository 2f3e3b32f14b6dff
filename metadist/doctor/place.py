"""What is examined: the nodes of a cluster, or this machine alone; and how nothing there may hang the command."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

from metadist.doctor.findings import Finding
from metadist.errors import MetadistError, first_line
from metadist.experiment import Experiment
from metadist.outer.gradient import Layout
from metadist.runtime.ray_probe import NoAnswer, Node

_T = TypeVar("_T")


class Place(Protocol):
    """Nodes that answer questions, each within a time; see :class:`metadist.runtime.ray_probe.ClusterNodes`.

    Attributes:
        nodes: by id.
        here: id of the driver's.
    """

    nodes: dict[str, Node]
    here: str

    def ask(self, question: Callable[..., Any], *args: Any, only: str | None = None) -> dict[str, Any]:
        """Answers by node, :class:`NoAnswer` of one that failed."""

    def store_rates(self, size: int) -> dict[str, Any]:
        """Seconds to put and to get so many bytes, by node; nothing where there is no object store."""

    def transfers(self, size: int) -> dict[tuple[str, str], Any]:
        """Seconds for so many bytes from a node to another."""

    def close(self) -> None:
        """Lets the nodes go."""


class ThisMachine:
    """This process's machine, without Ray."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s, self.here = deadline_s, "here"
        cpus = float(os.cpu_count() or 1)
        self.nodes = {self.here: Node(socket.gethostname(), cpus, free_cpus=cpus)}

    def ask(self, question: Callable[..., Any], *args: Any, only: str | None = None) -> dict[str, Any]:
        try:
            return {self.here: within(self._deadline_s, lambda: question(*args))}
        except Overdue as e:
            return {self.here: NoAnswer(str(e), silent=True)}
        except Exception as e:
            return {self.here: NoAnswer(first_line(e))}

    def store_rates(self, size: int) -> dict[str, Any]:
        return {}

    def transfers(self, size: int) -> dict[tuple[str, str], Any]:
        return {}

    def close(self) -> None:
        pass


@dataclass
class Subject:
    """What the checks are about.

    Args:
        place: where.
        experiment: what is to be run, if a config is given.
        run_dir: where it is to be kept, as it was named; None if it was not.
        default_run_dir: where runs are kept that are not told where.
        submitter: versions where the command was typed, if that is not the driver's process.
        started_here: the cluster is one of this machine, made for this.
        deadline_s: seconds in which a node has to answer.
    """

    place: Place
    experiment: Experiment | None = None
    run_dir: str | None = None
    default_run_dir: str = "runs"
    submitter: dict[str, str] | None = None
    started_here: bool = True
    deadline_s: float = 60.0

    @property
    def on_ray(self) -> bool:
        return not isinstance(self.place, ThisMachine)

    @cached_property
    def weights_bytes(self) -> int:
        """Of the meta-parameters; 0 if that cannot be told."""
        if self.experiment is None:
            return 0
        try:
            return 4 * sum(Layout.of(self.experiment.learner().initial_meta_params()).sizes)
        except MetadistError:
            return 0  # another check tells why

    def name(self, node: str) -> str:
        """A node's name; empty where there is but one."""
        return self.place.nodes[node].name if len(self.place.nodes) > 1 else ""

    def answers(self, check: str, told: dict[str, Any], mend: str = "") -> tuple[dict[str, Any], list[Finding]]:
        """What nodes have answered, and a finding for each that has not."""
        failed = {n: a for n, a in told.items() if isinstance(a, NoAnswer)}
        lost = "see what `ray status` and raylet.log say of the node, and start Ray on it again"
        findings = [
            Finding(check, "wrong", a.reason, "an answer", lost if a.silent else mend, self.place.nodes[n].name)
            for n, a in failed.items()
        ]
        return {n: a for n, a in told.items() if n not in failed}, findings


class Overdue(Exception):
    """Something has not ended in its time."""


def within(seconds: float, act: Callable[[], _T]) -> _T:
    """What ``act`` returns or raises, if it ends in time; else it is left behind in its thread.

    Raises:
        Overdue: it does not.
    """
    box: list[Any] = []

    def run() -> None:
        try:
            box.append((act(), None))
        except BaseException as e:
            box.append((None, e))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not box:
        raise Overdue(f"has not ended in {seconds:g} s")
    value, error = box[0]
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]
