"""A run from its start, or from where it was left, to its report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metadist.checkpoint import Checkpoint, newest_whole_checkpoint, versions_of
from metadist.config import Config
from metadist.errors import ConfigError
from metadist.experiment import Experiment
from metadist.loop import Training
from metadist.rundir import RunDirectory
from metadist.stopping import Interrupted
from metadist.storage import Store


def train(experiment: Experiment, run_dir: Path | None = None, adopt: bool = False) -> RunDirectory:
    """Meta-trains from the start.

    Args:
        experiment: what to run.
        run_dir: a directory that does not exist; None makes ``runs/NAME-TIME``.
        adopt: go on from what ``checkpoint.path`` holds, if it holds something: of a run whose directory is gone.

    Returns:
        The run directory, with summary, report and checkpoints in it.

    Raises:
        MetadistError: what a user can mend; nothing half-written stays behind.
        Interrupted: the run was stopped; it can be resumed if it says so.
    """
    run = RunDirectory.create(run_dir, experiment.config.name)
    with _kept_if_begun(run), Training(experiment, run) as training:
        training.run_all(*_from_elsewhere(run.store(experiment.config), experiment.config, adopt))
    return run


def resume(run_dir: Path, overrides: tuple[str, ...] = (), stand_ins: dict[str, Any] | None = None) -> RunDirectory:
    """Goes on from the newest whole checkpoint of a run; see :func:`train`.

    Args:
        run_dir: the run's directory.
        overrides: words ``key.sub=value`` that change its config from here on.
        stand_ins: of what its config cannot name or may not import; see :class:`Experiment`.
    """
    run = RunDirectory.open(run_dir)
    experiment = Experiment(run.load_config(overrides), **(stand_ins or {}))
    with _kept_if_begun(run), Training(experiment, run) as training:
        training.run_all(*_newest(run, experiment.config))
    return run


@contextlib.contextmanager
def _kept_if_begun(run: RunDirectory) -> Iterator[None]:
    """Leaves a run that has ended early only where it can be resumed, and says so."""
    try:
        yield
    except BaseException as e:
        kept = not run.discard()
        if kept and isinstance(e, Interrupted):
            e.run_dir = run.path
        raise


def _newest(run: RunDirectory, config: Config) -> tuple[Checkpoint | None, list[str]]:
    """What a run is resumed from: nothing, if it was killed before its first checkpoint."""
    before = run.load_config()
    moved = config.checkpoint.path != before.checkpoint.path
    if not moved:
        run.check_taken(run.store(config), config)
    stores = [run.store(config), run.store(before)] if moved else [run.store(config)]
    return next((newest_whole_checkpoint(store) for store in stores if versions_of(store)), (None, []))


def _from_elsewhere(store: Store, config: Config, adopt: bool) -> tuple[Checkpoint | None, list[str]]:
    if config.checkpoint.path is None or not versions_of(store):
        return None, []
    if adopt:
        return newest_whole_checkpoint(store)
    raise ConfigError(
        "checkpoint.path",
        f"is {config.checkpoint.path}, which holds checkpoints of another run",
        "name another place, or go on with that run: `metadist train --resume-if-exists`",
    )
