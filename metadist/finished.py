"""What can be done with a run that is there: its learner, its evaluation, its updates made again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metadist.algorithms import Algorithm
from metadist.checkpoint import (
    BEST,
    LATEST,
    Checkpoint,
    best_of,
    check_fits,
    load_checkpoint,
    newest_whole_checkpoint,
    versions_of,
)
from metadist.errors import CheckpointError, RunDirError
from metadist.evaluation import evaluation_round, summarise, tasks_together
from metadist.experiment import Experiment
from metadist.history import UPDATES, replayed, updates
from metadist.inputs import Inputs
from metadist.outer.gradient import Layout, sha256_of
from metadist.progress import tracked
from metadist.rundir import RunDirectory
from metadist.server import outer_options
from metadist.storage import Store


def evaluate(
    run_dir: Path, episodes: int | None = None, stand_ins: dict[str, Any] | None = None, which: str = LATEST
) -> dict[str, Any]:
    """The evaluation of one of a run's checkpoints, computed in this process; ``which`` as of :func:`load_learner`."""
    learner, experiment, checkpoint = load_learner(run_dir, stand_ins, which)
    config = experiment.config.evaluation
    count = episodes or config.episodes
    size = experiment.evaluation_size
    together = tasks_together(Layout.of(checkpoint.meta_params).numel)
    round = evaluation_round(checkpoint.version, config.split, count, together, size)
    source = experiment.source(config.split, size)
    pieces: dict[str, list[np.ndarray]] = {}
    dtype = next(iter(checkpoint.meta_params.values())).dtype
    for m in tracked(range(round.microbatches), "evaluating", round.microbatches):
        batch = source.episodes(experiment.config.seed, round.stream, round.episodes(m))
        with torch.no_grad():
            judged = learner.evaluate_in_full(checkpoint.meta_params, batch.to("cpu", dtype))
            for name, values in judged.items():
                pieces.setdefault(name, []).append(values.double().numpy().reshape(-1))
    metrics = {k: np.concatenate(v) for k, v in pieces.items()}
    result = summarise(metrics, learner.objective.metric, config.split, learner.model.batchnorm)
    return {"run_dir": str(run_dir), "version": checkpoint.version, **result}


def replay(run_dir: Path, version: int | None = None, code: bool | frozenset[str] = False) -> dict[str, Any]:
    """Makes an asynchronous run's weights again from its log of updates, in this process.

    The options are those of the run's config: a run whose schedule or optimizer was changed at a resume cannot be made
    again.

    Args:
        run_dir: the run's directory.
        version: as far as this one, of which there must be a checkpoint; None: the newest.
        code: of :class:`~metadist.experiment.Experiment`.

    Returns:
        ``run_dir, version, meta_params_sha256, same``: whether they are the bits of the checkpoint.

    Raises:
        RunDirError: there is no log, it is cut, or it does not reach the version.
    """
    run = RunDirectory.open(run_dir)
    config, log = run.load_config(), updates(run_dir)
    if version is None:
        checkpoint, _ = newest_whole_checkpoint(run.store(config))
    else:
        checkpoint = load_checkpoint(run.store(config), version)
    if not 0 < checkpoint.version <= len(log):
        found = f"has {len(log)} updates, but the checkpoint is of version {checkpoint.version}"
        raise RunDirError(run_dir / UPDATES, found, "name a version that both have")
    experiment = Experiment(config, code=code)
    learner = experiment.learner()
    options = outer_options(experiment, learner, Layout.of(learner.initial_meta_params()))
    last: dict[str, torch.Tensor] = {}
    steps = replayed(experiment, options, log[: checkpoint.version])
    for _, made in tracked(steps, "replaying", checkpoint.version):
        last = made
    digest = sha256_of(last)
    same = digest == sha256_of(checkpoint.meta_params)
    return {"run_dir": str(run_dir), "version": checkpoint.version, "meta_params_sha256": digest, "same": same}


def load_learner(
    run_dir: Path, stand_ins: dict[str, Any] | None = None, which: str = LATEST, plain: bool = False
) -> tuple[Algorithm, Experiment, Checkpoint]:
    """The learner of a run, at one of its checkpoints.

    Args:
        run_dir: the run's directory.
        stand_ins: of what its config cannot name; see :class:`Experiment`.
        which: ``latest``, the newest that is whole; ``best``, of the evaluations during training; or a version.
        plain: compute with torch's own operators alone, neither traced nor compiled.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    run = RunDirectory.open(run_dir)
    experiment = Experiment(run.load_config(), **(stand_ins or {}))
    if plain:
        experiment = experiment.with_engine(compile=False, convolution="direct", fused_norm=False)
    torch.set_num_threads(experiment.config.runtime.threads_per_worker)
    checkpoint = _checkpoint(run.store(experiment.config), which)
    if checkpoint.inputs is not None:
        try:
            experiment = replace(experiment, known=Inputs.read(checkpoint.inputs))
        except (TypeError, ValueError, KeyError) as e:
            raise CheckpointError(run_dir, f"does not say what its inputs look like ({e})") from e
    learner = experiment.learner()
    check_fits(checkpoint, Layout.of(learner.initial_meta_params()), None, run_dir)
    return learner, experiment, checkpoint


def _checkpoint(store: Store, which: str) -> Checkpoint:
    if which == LATEST:
        return newest_whole_checkpoint(store)[0]
    try:
        version = best_of(store) if which == BEST else int(which)
    except (OSError, ValueError) as e:
        raise CheckpointError(store, f"has no checkpoint {which!r}", _known(store)) from e
    if version is None:
        raise CheckpointError(store, "holds no best checkpoint", "train with evaluation.every, or take the latest")
    if version not in versions_of(store):
        raise CheckpointError(store, f"holds no checkpoint of version {version}", _known(store))
    return load_checkpoint(store, version)


def _known(store: Store) -> str:
    return "there are " + ", ".join(map(str, versions_of(store))) + ", latest and best"
