"""What a run shows at its end: its report, and pictures for whoever follows it."""

from __future__ import annotations

from pathlib import Path

import torch

from metadist.algorithms import Algorithm
from metadist.evaluation import tasks_together
from metadist.experiment import Experiment
from metadist.outer.gradient import Layout
from metadist.tracking import ShownEpisode, Trackers

_SHOWN = 8
"""Episodes of the last evaluation that are drawn for Weights & Biases; the report shows fewer."""


def show_run(
    experiment: Experiment,
    learner: Algorithm,
    meta_params: dict[str, torch.Tensor],
    run_dir: Path,
    trackers: Trackers,
    episodes_too: bool,
) -> None:
    """Writes the report of a run that has its summary, with pictures of episodes, and tells trackers of these.

    Args:
        experiment, learner: the run's.
        meta_params: its last.
        run_dir: where the report goes.
        trackers: who get pictures.
        episodes_too: whether they get a table of episodes as well.
    """
    from metadist.figures import CURVE, INSTANCES, draw_episodes, episode_pictures
    from metadist.report import write_report

    evaluation = experiment.config.evaluation
    source = experiment.source(evaluation.split, experiment.evaluation_size)
    shown = range(min(_SHOWN, evaluation.episodes, tasks_together(Layout.of(meta_params).numel)))
    batch = source.episodes(experiment.config.seed, f"evaluation/{evaluation.split}", shown)
    batch = batch.to("cpu", next(iter(meta_params.values())).dtype)
    before, after = learner.outputs(meta_params, batch)
    picture = draw_episodes(batch, run_dir / "episodes.png", before, after)
    write_report(run_dir)
    if (by_instance := run_dir / INSTANCES).is_file():
        trackers.log_picture("accuracy_by_instance", by_instance)
    trackers.log_picture("learning_curve", run_dir / CURVE)
    if picture is not None:
        trackers.log_picture("episodes", picture)
    if episodes_too:
        measure, true = learner.objective.measure, batch.query.y
        episodes = [
            ShownEpisode(n, drawn, *(float(measure(outputs[n], true[n])) for outputs in (before, after)))
            for n, drawn in enumerate(episode_pictures(batch, before, after))
        ]
        trackers.log_episodes(experiment.config.outer.steps, evaluation.split, episodes)
