"""The examination: where, which checks, one after the other, each with a deadline."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from metadist.config import Config
from metadist.config.schema import RuntimeConfig
from metadist.doctor import checks, login, probes, rates, workers
from metadist.doctor.findings import Finding, Verdict, worst
from metadist.doctor.place import Overdue, Place, Subject, ThisMachine, within
from metadist.errors import MetadistError, first_line
from metadist.experiment import Experiment

Check = Callable[[Subject], Iterator[Finding]]

CHECKS: tuple[tuple[str, Check, float], ...] = (
    ("nodes", checks.nodes, 1.5),
    ("versions", checks.versions, 1.5),
    ("resources", checks.resources, 1.5),
    ("memory", checks.memory, 3),
    ("storage", checks.storage, 6),
    ("shards", checks.shards, 3),
    ("tracking", login.tracking, 1.5),
    ("object store", rates.object_store, 6),
    ("network", rates.network, 6),
    ("workers", workers.workers, 20),
)
"""Name, check, and after how many times the nodes' deadline it is left behind, whatever hangs."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of the doctor.

    Args:
        config: what is to be run, if anything.
        address: of the cluster, as for ``ray.init``; None starts Ray here, as a run does.
        run_dir: where the run is to be kept.
        default_run_dir: where runs are kept that are not told where.
        code: what the config may import.
        timeout_s: seconds in which a node has to answer.
        submitter: versions where the command was typed, if elsewhere.
    """

    config: Config | None = None
    address: str | None = None
    run_dir: str | None = None
    default_run_dir: str = "runs"
    code: bool | frozenset[str] = False
    timeout_s: float = 60.0
    submitter: dict[str, str] | None = None


@dataclass
class Listener:
    """Who is told of the examination as it goes.

    Args:
        checking: takes the name of a check that begins.
        found: takes what is found.
    """

    checking: Callable[[str], None] = lambda name: None
    found: Callable[[Finding], None] = lambda finding: None


@dataclass
class Report:
    """What was found.

    Attributes:
        hung: something was left behind in its thread: the process should be ended at once.
    """

    findings: list[Finding] = field(default_factory=list)
    hung: bool = False

    @property
    def verdict(self) -> Verdict:
        return worst(self.findings)


def examine(wanted: Wanted, listener: Listener) -> Report:
    """Runs every check; nothing is raised for what is wrong."""
    report, folder = Report(), os.getcwd()

    def note(finding: Finding) -> None:
        report.findings.append(finding)
        listener.found(finding)

    listener.checking("cluster")
    try:
        # Here, since the processes of a Ray that is started end with the thread that has started them.
        started = _start_here(wanted)
        subject = within(4 * wanted.timeout_s, lambda: _subject(wanted, started))
    except Overdue as e:
        report.hung = True
        note(_not_there(wanted, str(e)))
        return report
    except MetadistError as e:
        note(Finding("cluster", "wrong", f"{e.where}: {e.problem}", "a cluster that answers", e.mend))
        return report
    for name, check, times in CHECKS:
        listener.checking(name)
        with contextlib.suppress(OSError):
            # Nodes of one host share the folder that a job is sent: one that unpacks it anew takes this one away.
            os.chdir(folder)
        try:
            for finding in _found(subject, check, times * wanted.timeout_s):
                note(finding)
        except Overdue as e:
            report.hung = True
            mend = "something hangs: see `ray status` and the logs of the nodes named above, or raise --timeout"
            note(Finding(name, "wrong", f"the check {e}", "an answer", mend))
        except MetadistError as e:
            note(Finding(name, "wrong", f"{e.where}: {e.problem}", "", e.mend))
        except Exception as e:
            note(Finding(name, "wrong", f"the check failed ({type(e).__name__}: {first_line(e)})", "", _LOOK))
    try:
        within(wanted.timeout_s, lambda: _leave(subject.place))
    except Overdue:
        report.hung = True
    return report


_LOOK = "see `ray status`, and whether every node still lives"


def _found(subject: Subject, check: Check, seconds: float) -> list[Finding]:
    return within(seconds, lambda: list(check(subject)))


def _not_there(wanted: Wanted, why: str) -> Finding:
    where = wanted.address or "a Ray of this machine"
    mend = "see that the head runs (`ray status` there) and that this machine may reach its ports"
    return Finding("cluster", "wrong", f"{where} {why}", "a cluster that answers", mend)


def _runtime(wanted: Wanted) -> RuntimeConfig:
    runtime = RuntimeConfig() if wanted.config is None else wanted.config.runtime
    if wanted.address is None:
        return runtime
    return runtime.model_copy(update={"type": "ray", "address": wanted.address})


def _start_here(wanted: Wanted) -> bool:
    """Starts Ray on this machine, as a run does that names no cluster; whether it did."""
    runtime = _runtime(wanted)
    if runtime.type == "local" or runtime.address is not None:
        return False
    from metadist.runtime.cluster import connect

    return connect(runtime)


def _subject(wanted: Wanted, started_here: bool) -> Subject:
    """Joins the cluster, if it is not started here."""
    config, runtime, experiment = wanted.config, _runtime(wanted), None
    if config is not None:
        experiment = Experiment(config.model_copy(update={"runtime": runtime}), code=wanted.code)
    place: Place
    if runtime.type == "local":
        place = ThisMachine(wanted.timeout_s)
    else:
        from metadist.runtime.cluster import connect
        from metadist.runtime.ray_probe import ClusterNodes

        if not started_here:
            connect(runtime)
        place = ClusterNodes(wanted.timeout_s, by_value=(probes,))
    return Subject(
        place, experiment, wanted.run_dir, wanted.default_run_dir, wanted.submitter,
        started_here=started_here, deadline_s=wanted.timeout_s,
    )  # fmt: skip


def _leave(place: Place) -> None:
    place.close()
    if not isinstance(place, ThisMachine):
        import ray

        ray.shutdown()
