"""A run judged on other data than its own, beside what needs no meta-training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metadist.algorithms import Algorithm
from metadist.baselines import (
    features_centroid,
    features_of,
    fine_tuned,
    inputs_centroid,
    inverse_document_frequency,
    words_centroid,
)
from metadist.checkpoint import LATEST
from metadist.config.schema import ClassTasks, TextTasksConfig
from metadist.data import load_manifest
from metadist.episode import EpisodeBatch
from metadist.errors import ConfigError, DataError
from metadist.evaluation import summarise, tasks_together
from metadist.experiment import DTYPES, Experiment
from metadist.finished import load_learner
from metadist.inner import Tensors
from metadist.outer.gradient import Layout
from metadist.progress import tracked
from metadist.tasks.base import TaskSource
from metadist.tasks.fitted import Fitted
from metadist.tasks.shards import ShardTasks
from metadist.tasks.texts import TextTasks

RUN, SCRATCH, TUNED = "the run", "fine-tuned from scratch", "fine-tuned from the run"
NEAREST, PLAIN, WORDS = "centroid of features", "centroid of inputs", "centroid of words, tf-idf"

_Judge = Callable[[EpisodeBatch], Tensor]


@dataclass(frozen=True)
class Crossing:
    """What is judged.

    Args:
        sets: shard sets.
        shots: support examples of each class, one table column for each; none: the run's own.
        ways, query_shots: of an episode; None: as the run's evaluation has them.
        split: of each set.
        episodes: of each set and number of shots.
        baselines: who is judged beside the run: ``all``, ``centroids`` or ``none``.
        which: checkpoint of the run.
    """

    sets: Sequence[Path]
    shots: Sequence[int] = ()
    ways: int | None = None
    query_shots: int | None = None
    split: str = "test"
    episodes: int = 600
    baselines: str = "all"
    which: str = LATEST
    stand_ins: dict[str, Any] = field(default_factory=dict)


def crossed(run_dir: Path, crossing: Crossing) -> list[dict[str, Any]]:
    """A row for each set, number of shots and method.

    All methods see the same episodes, a fixed, seeded set. Words are weighted by how few texts of the set's training
    split (of the judged one, if there is none) they are in. Fine-tuning fits the run's network, with a new last layer,
    to each support set by Adam; from scratch it sets out from where the run's training began.

    Returns:
        ``data, name, content_id, split, ways, shots, query_shots, method, metric, episodes, mean, ci95, batchnorm``.

    Raises:
        MetadistError: there is no such run, it does not tell classes apart, or a set cannot give such episodes.
    """
    learner, experiment, checkpoint = load_learner(run_dir, crossing.stand_ins or None, crossing.which)
    if not isinstance(experiment.config.tasks, ClassTasks):
        kind = experiment.config.tasks.type
        raise ConfigError("tasks.type", f"of the run is {kind}, without classes", "leave --data out")
    judge = _Judged(learner, experiment, checkpoint.meta_params, crossing.baselines)
    asked = [(path, shots) for path in crossing.sets for shots in crossing.shots or (None,)]
    return [row for path, shots in asked for row in judge.on(path, shots, crossing)]


class _Judged:
    """A learner and what it is compared with."""

    def __init__(self, learner: Algorithm, experiment: Experiment, meta_params: Tensors, baselines: str) -> None:
        self.learner, self.experiment, self.meta_params = learner, experiment, meta_params
        self.example = experiment.example()
        self.dtype = DTYPES[experiment.config.engine.precision]
        self.parts = features_of(learner, self.example) if baselines != "none" else None
        self.baselines = baselines

    def on(self, path: Path, shots: int | None, crossing: Crossing) -> Iterator[dict[str, Any]]:
        """The rows of one set and one number of shots."""
        source, size = self._source(path, shots, crossing)
        methods = self._methods(size["ways"], source)
        together = tasks_together(Layout.of(self.meta_params).numel)
        stream, seed = f"crossing/{crossing.split}", self.experiment.config.seed
        starts = range(0, crossing.episodes, together)
        found: dict[str, list[np.ndarray]] = {name: [] for name in methods}
        for start in tracked(starts, f"{path.name}, {size['shots']} shots,", len(starts)):
            numbers = range(start, min(start + together, crossing.episodes))
            batch = source.episodes(seed, stream, numbers).to("cpu", self.dtype)
            for name, judge in methods.items():
                found[name].append(judge(batch).double().numpy())
        told = {k: source.describe()[k] for k in ("name", "content_id")}
        source.close()
        metric, batchnorm = self.learner.objective.metric, self.learner.model.batchnorm
        for name, values in found.items():
            result = summarise({metric: np.concatenate(values)}, metric, crossing.split, batchnorm)
            del result["pre_adaptation"]
            yield {"data": str(path), **told, "method": name, **size, **result}

    def _methods(self, ways: int, source: TaskSource) -> dict[str, _Judge]:
        """The accuracy of each method, ``[T]``, on T episodes."""
        learner = self.learner.with_ways(ways)

        def run(batch: EpisodeBatch) -> Tensor:
            with torch.no_grad():
                return learner.evaluate(self.meta_params, batch)[self.learner.objective.metric]

        methods: dict[str, _Judge] = {RUN: run}
        if self.baselines == "none":
            return methods
        if self.parts is not None:
            features, names = self.parts
            learned = {k: self.meta_params[k] for k in names if k in self.meta_params}
            begun = {k: v for k, v in self.learner.initial_meta_params().items() if k in learned}
            if self.baselines == "all":
                methods[TUNED] = lambda batch: _share(fine_tuned(features, learned, batch, ways))
                methods[SCRATCH] = lambda batch: _share(fine_tuned(features, begun, batch, ways))
            methods[NEAREST] = lambda batch: _share(features_centroid(features, learned, batch, ways))
        if isinstance(source, TextTasks):
            weights = inverse_document_frequency(torch.from_numpy(source.every_text("train")), source.vocabulary)
            methods[WORDS] = lambda batch: _share(words_centroid(batch, ways, weights))
        else:
            methods[PLAIN] = lambda batch: _share(inputs_centroid(batch, ways))
        return methods

    def _source(self, path: Path, shots: int | None, crossing: Crossing) -> tuple[TaskSource, dict[str, int]]:
        """A set's episodes as the run's learner takes them, and their size."""
        section, own = self.experiment.config.tasks, self.experiment.evaluation_size
        assert isinstance(section, ClassTasks)
        size = {
            "ways": crossing.ways or own.ways or section.ways,
            "shots": shots or own.shots or section.shots,
            "query_shots": crossing.query_shots or own.query_shots or section.query_shots,
        }
        if size["ways"] != (own.ways or section.ways) and not self.learner.any_ways:
            raise ConfigError(
                "--ways",
                f"is {size['ways']}, and the run's network answers with one of {own.ways or section.ways}",
                "leave it out, or train a learner without such a layer, such as protonet",
            )
        common = {**size, "split": crossing.split, "order": section.order, "labels": section.labels}
        texts = load_manifest(path).field.encoding == "utf-8"
        if isinstance(section, TextTasksConfig):
            reading = {"tokens": section.tokens, "length": section.length, "vocabulary": section.vocabulary}
            return TextTasks(path, **common, **reading), size  # type: ignore[arg-type]
        if texts:
            raise DataError(path, "holds texts, and the run has learned from pictures", "name a set of pictures")
        x = self.example.support.x
        if x.dim() != 4 or x.shape[1] not in (1, 3):
            shape = list(x.shape[1:])
            raise ConfigError("--data", f"holds pictures, and the run's inputs have shape {shape}", "leave it out")
        return Fitted(ShardTasks(path, **common), x.shape[1], (x.shape[2], x.shape[3])), size  # type: ignore[arg-type]


def _share(right: Tensor) -> Tensor:
    return right.double().mean(-1)


def table_of(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of a table: a line for each set and method, a column for each number of shots."""
    from metadist.tracking.console import interval

    shots = list(dict.fromkeys(row["shots"] for row in rows))
    found = {(row["data"], row["method"], row["shots"]): interval(row) for row in rows}
    lines = list(dict.fromkeys((row["data"], row["name"], row["method"]) for row in rows))
    columns = ["data", "method", *(f"{k} shot{'s' * (k > 1)}" for k in shots)]
    return columns, [[name, method, *(found.get((data, method, k), "") for k in shots)] for data, name, method in lines]
