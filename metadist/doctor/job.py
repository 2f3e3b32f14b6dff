"""The examination as a job of a Ray cluster, by whose dashboard alone it can be reached."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from metadist.doctor.examine import Listener, Report, Wanted
from metadist.doctor.findings import Finding
from metadist.doctor.place import Overdue, within
from metadist.doctor.probes import versions
from metadist.errors import MetadistError
from metadist.jobs import Jobs
from metadist.submit import Sending, packed

_MARK = "@metadist-doctor "
_LONGEST = 60
"""How many times the nodes' deadline a whole examination may take."""


def examine_as_job(
    address: str, config: Path | None, overrides: Sequence[str], wanted: Wanted, sending: Sending, listener: Listener
) -> Report:
    """Runs the checks on a cluster as ``metadist submit`` runs a config there.

    Args:
        address: of the dashboard.
        config: the file; inside the folder that is sent.
        overrides: words ``key.sub=value``.
        wanted: what is asked.
        sending: how the job gets what it needs.
        listener: who is told.
    """
    listener.checking("cluster")
    reader = _Reader(listener)
    try:
        jobs = Jobs(address)
        options = ["--address", "auto", "--timeout", f"{wanted.timeout_s:g}", "--as-job", json.dumps(versions())]
        options += ["--run-dir", wanted.run_dir] if wanted.run_dir is not None else []
        options += ["--allow-code"] if sending.allow_code else []
        entrypoint, runtime_env, _ = packed("doctor", config, overrides, options, sending)
        job = jobs.send(entrypoint, runtime_env, {"metadist": "doctor"})
        with _ended_early(jobs, job):
            within(_LONGEST * wanted.timeout_s, lambda: jobs.follow(job, reader.read))
    except Overdue as e:
        reader.report.hung = True
        reader.found(Finding("cluster", "wrong", f"the job {e}", "an answer", f"see its log at {address}"))
    except MetadistError as e:
        reader.found(Finding("cluster", "wrong", f"{e.where}: {e.problem}", "a cluster that answers", e.mend))
    else:
        if not reader.ended:
            said = next((line for line in reversed(reader.other) if line.strip()), "nothing")
            mend = (
                "install metadist on the head as on every node, and start Ray from that environment; "
                f"`metadist submit logs {job} --address {address}` shows the rest"
            )
            reader.found(Finding("cluster", "wrong", f"the job ended early, with: {said}", "a whole examination", mend))
    return reader.report


@contextlib.contextmanager
def _ended_early(jobs: Jobs, job: str) -> Iterator[None]:
    """Stops the job of an examination that nobody waits for any more, after Ctrl-C for instance."""
    try:
        yield
    except (Overdue, KeyboardInterrupt):
        with contextlib.suppress(MetadistError, Overdue):
            within(10.0, lambda: jobs.stop(job))
        raise


class Teller:
    """In the job: tells, by lines of its log, what is found."""

    def checking(self, name: str) -> None:
        self._tell({"checking": name})

    def found(self, finding: Finding) -> None:
        self._tell({"finding": finding.as_dict()})

    def close(self) -> None:
        self._tell({"end": True})

    def _tell(self, what: dict[str, object]) -> None:
        print(f"\n{_MARK}{json.dumps(what)}", flush=True)


class _Reader:
    """Hands on what :class:`Teller` has told."""

    def __init__(self, listener: Listener) -> None:
        self._listener, self._rest = listener, ""
        self.report, self.ended = Report(), False
        self.other: list[str] = []

    def found(self, finding: Finding) -> None:
        self.report.findings.append(finding)
        self._listener.found(finding)

    def read(self, text: str) -> None:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            if not line.startswith(_MARK):
                self.other.append(line)
                continue
            told = json.loads(line[len(_MARK) :])
            if "checking" in told and told["checking"] != "cluster":
                self._listener.checking(told["checking"])
            if "finding" in told:
                self.found(Finding(**told["finding"]))
            self.ended = self.ended or "end" in told
