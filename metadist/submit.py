"""Handing a config to a Ray cluster as a job."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from metadist.config import load_config
from metadist.errors import ClusterError, ConfigError, first_line

_EXCLUDES = [
    ".git",
    ".venv",
    "runs",
    "**/__pycache__",
    "*.pyc",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
]
_POLL_S = 1.0
_AGENT_TIMEOUT_S = 120.0


def submit(
    config: Path,
    address: str,
    overrides: Sequence[str] = (),
    run_dir: str | None = None,
    working_dir: Path | None = None,
    out: Callable[[str], None] = print,
    allow_code: bool = False,
) -> int:
    """Runs ``metadist train`` as a Ray job, with the working tree packed, and follows its log.

    Args:
        config: a YAML file inside the working tree.
        address: of the cluster's dashboard, ``http://HOST:8265``.
        overrides: words ``key.sub=value``.
        run_dir: where the job keeps its run, a path on the cluster's head or shared storage.
        working_dir: the tree to pack; None takes the current folder.
        out: takes the log, piece by piece.
        allow_code: let the job import what its config names by ``import_path``.

    Returns:
        0 if the job succeeded, else 1.

    Raises:
        ConfigError: the config is wrong or outside the tree. Nothing is sent.
        ClusterError: the cluster does not answer.
    """
    tree = (working_dir or Path.cwd()).resolve()
    load_config(config, overrides)
    try:
        inside = config.resolve().relative_to(tree)
    except ValueError:
        raise ConfigError(
            config, f"lies outside {tree}, which is what is sent", "run submit from a folder above it"
        ) from None
    client = _client(address)
    words = [
        "python",
        "-m",
        "metadist.cli",
        "train",
        str(inside),
        *overrides,
        "runtime.type=ray",
        "runtime.address=auto",
    ]
    if allow_code:
        words.append("--allow-code")
    if run_dir is not None:
        words += ["--run-dir", run_dir, "--resume-if-exists"]
    job = _send(client, shlex.join(words), tree, str(inside))
    out(f"submitted {job} to {address}\n")
    return _follow(client, job, out)


def _client(address: str):  # type: ignore[no-untyped-def]
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise ClusterError(
            "--address",
            f"no Ray dashboard answers at {address} ({first_line(e)})",
            "give the dashboard's address, usually http://HOST:8265, and see that the head runs its dashboard",
        ) from e


def _send(client, entrypoint: str, tree: Path, config: str) -> str:  # type: ignore[no-untyped-def]
    """Submits the job; a head that has just started has no agent to take it for some seconds."""
    deadline = time.monotonic() + _AGENT_TIMEOUT_S
    while True:
        try:
            return client.submit_job(
                entrypoint=entrypoint,
                runtime_env={"working_dir": str(tree), "excludes": _EXCLUDES},
                metadata={"metadist_config": config},
            )
        except RuntimeError as e:
            if "No available agent" not in str(e) or time.monotonic() > deadline:
                raise ClusterError("--address", f"the cluster did not take the job ({first_line(e)})") from e
        time.sleep(_POLL_S)


def _follow(client, job: str, out: Callable[[str], None]) -> int:  # type: ignore[no-untyped-def]
    """Prints what the job's log gains until the job is over."""
    shown = 0
    while True:
        status = client.get_job_status(job)
        log = client.get_job_logs(job)
        if len(log) > shown:
            out(log[shown:])
            shown = len(log)
        if status.is_terminal():
            break
        time.sleep(_POLL_S)
    out(f"job {job} {status.value.lower()}\n")
    return 0 if status.value == "SUCCEEDED" else 1
