"""Handing a config to a Ray cluster as a job."""

from __future__ import annotations

import datetime
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metadist.config import load_config
from metadist.errors import ConfigError
from metadist.jobs import Jobs, Out
from metadist.packing import EXCLUDES, tree_at

SENT_IF_SET = ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY")
"""Variables of the submitter's that a job gets unasked."""

_OURS = ("GLIBC_TUNABLES", "OMP_NUM_THREADS")
_CONFIG_VARIABLE = "METADIST_CONFIG"
RUNS = "~/metadist-runs"
"""Where jobs keep their runs that are not told where, on the head."""


@dataclass(frozen=True)
class Sending:
    """How a job gets what it needs.

    Args:
        tree: the folder that is sent; None takes the current one.
        image: a container image that the job runs in, which holds metadist and all else; no folder is sent then.
        env: names of variables whose values the job gets from the submitter's environment.
        allow_code: let the job import what its config names by ``import_path``.
    """

    tree: Path | None = None
    image: str | None = None
    env: Sequence[str] = ()
    allow_code: bool = False


@dataclass(frozen=True)
class Submission:
    """A job as Ray takes it.

    Args:
        entrypoint: the shell command; holds no secret, since the job's log begins with it.
        runtime_env: what it runs in.
        metadata: what is kept beside it.
        told: lines for the submitter.
    """

    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    told: tuple[str, ...] = ()


def submission(
    config: Path, overrides: Sequence[str] = (), run_dir: str | None = None, sending: Sending = Sending()
) -> Submission:
    """The job that runs ``metadist train``.

    Args:
        config: a YAML file; inside the folder that is sent, unless an image is named.
        overrides: words ``key.sub=value``.
        run_dir: where the job keeps its run, a path on the cluster's head or shared storage; None makes
            ``~/metadist-runs/NAME-TIME`` there. A run that is there already goes on.
        sending: how.

    Raises:
        ConfigError: the config is wrong or outside the folder, or a variable is not set.
        ClusterError: the folder is too large to be sent.
    """
    name = load_config(config, overrides).name
    told = []
    if run_dir is None:
        run_dir = f"{RUNS}/{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        told.append(f"run directory: {run_dir} on the head (--run-dir names another, on shared storage say)")
    options = ["--run-dir", run_dir, "--resume-if-exists", *(["--allow-code"] if sending.allow_code else [])]
    words = [*overrides, "runtime.type=ray", "runtime.address=auto"]
    entrypoint, runtime_env, sent = packed("train", config, words, options, sending)
    metadata = {"metadist_config": str(config), "metadist_run_dir": run_dir}
    return Submission(entrypoint, runtime_env, metadata, (*sent, *told))


def packed(
    command: str, config: Path | None, overrides: Sequence[str], options: Sequence[str], sending: Sending
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """A command of ours as an entrypoint, the environment it runs in, and what to tell of that.

    Raises:
        ConfigError: the config is outside the folder that is sent, or a variable is not set.
        ClusterError: the folder is too large to be sent.
    """
    variables = _variables(sending.env)
    told = [f"sent by environment: {', '.join(variables)}"] if variables else []
    # As long as a step and a checkpoint may take; Ray kills a job that is to stop after three seconds otherwise.
    variables.setdefault("RAY_JOB_STOP_WAIT_TIME_S", "120")
    words = ["exec", "python", "-m", "metadist.cli", command]
    rest = " ".join(map(_quoted, [*overrides, *options]))
    if sending.image is not None:
        runtime_env: dict[str, Any] = {"image_uri": sending.image}
        start = ""
        if config is not None:
            variables[_CONFIG_VARIABLE] = config.read_text()
            start = f'f=$(mktemp --suffix=.yaml) && printf %s "${_CONFIG_VARIABLE}" > "$f" && '
        entrypoint = start + " ".join([*words, *(['"$f"'] if config is not None else []), rest])
        told.insert(0, f"runs in {sending.image}; no folder is sent")
    elif config is None:  # nothing of the folder is wanted
        runtime_env = {}
        entrypoint = " ".join([*words, rest])
    else:
        root = (sending.tree or Path.cwd()).resolve()
        inside = _inside(config, root)
        tree = tree_at(root)
        tree.check()
        runtime_env = {"working_dir": str(root), "excludes": list(EXCLUDES)}
        entrypoint = f"{shlex.join([*words, inside])} {rest}"
        told.insert(0, f"sends {tree}")
    return entrypoint.rstrip(), {**runtime_env, "env_vars": variables}, tuple(told)


def submit(jobs: Jobs, made: Submission, out: Out = print) -> str:
    """Sends a job, and tells what was sent; its id."""
    for line in made.told:
        out(f"{line}\n")
    job = jobs.send(made.entrypoint, made.runtime_env, made.metadata)
    out(f"submitted {job} to {jobs.address}\n")
    return job


def _inside(config: Path, root: Path) -> str:
    try:
        return str(config.resolve().relative_to(root))
    except ValueError:
        raise ConfigError(
            config, f"lies outside {root}, which is what is sent", "run submit from a folder above it"
        ) from None


def _variables(names: Sequence[str]) -> dict[str, str]:
    """Variables that travel with a job, by what is set here."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            said = name.partition("=")[0]
            raise ConfigError(
                f"--env {said}", "takes a name alone", f"`export {said}=...` before, and write --env {said}"
            )
        if name in _OURS:
            raise ConfigError(f"--env {name}", "is set by a run for its workers itself", "leave it out")
        if name not in os.environ:
            raise ConfigError(f"--env {name}", "is not set here", f"`export {name}=...` before submitting")
    return {n: os.environ[n] for n in dict.fromkeys([*SENT_IF_SET, *names]) if n in os.environ}


def _quoted(word: str) -> str:
    """A word for the head's shell, in which ``~/`` at its start is the home there."""
    return "~/" + shlex.quote(word[2:]) if word.startswith("~/") else shlex.quote(word)
