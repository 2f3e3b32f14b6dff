"""A run's learner adapted to somebody's few examples, and its answers about others: ``metadist adapt``."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metadist.algorithms import Algorithm
from metadist.api import AdaptedModel, Learner
from metadist.checkpoint import LATEST
from metadist.config.schema import TextTasksConfig
from metadist.data.folders import fitted, picture, source_files
from metadist.data.sources import IMAGE_SUFFIXES, SourceFile, file_reader
from metadist.data.tables import read_rows
from metadist.data.tokens import Tokens
from metadist.data.tolerance import Tolerance
from metadist.episode import Examples
from metadist.errors import ConfigError, DataError
from metadist.experiment import Experiment
from metadist.files import write_for_a_person
from metadist.finished import load_learner
from metadist.inputs import Inputs
from metadist.seeding import Rng

_TOGETHER = 256


@dataclass(frozen=True)
class Given:
    """Examples as somebody has them.

    Args:
        names: of each: a file, or a line of a table.
        x: as the run's network takes them, ``[N, ...]``.
        classes: of each, where it is told.
    """

    names: list[str]
    x: Tensor
    classes: list[str | None]


@dataclass(frozen=True)
class Adapted:
    """A learner adapted to a support set.

    Args:
        run_dir, version: of the run.
        classes: names of the classes, in the order of the outputs.
        shots: support examples of each.
        model: takes inputs ``[N, ...]`` and gives scores ``[N, at least so many classes]``.
        inputs: what they look like.
        batchnorm: whose statistics normalise the inputs.
        tokens: how texts are read, where inputs are texts.
    """

    run_dir: Path
    version: int
    classes: list[str]
    shots: dict[str, int]
    model: AdaptedModel
    inputs: Inputs
    batchnorm: str
    tokens: Tokens | None = None

    def probabilities(self, x: Tensor) -> Tensor:
        """Of each class, ``[N, classes]``; inputs that are normalised by each other's statistics go in all at once."""
        parts = [x] if self.batchnorm == "transductive" else list(x.split(_TOGETHER))
        with torch.no_grad():
            return torch.cat([self.model(part)[:, : len(self.classes)].softmax(-1) for part in parts])

    @property
    def note(self) -> str:
        """What a user must know of its answers; empty if there is nothing."""
        if self.batchnorm != "transductive":
            return ""
        return (
            "each query is normalised by the statistics of all that are asked about together, so answers depend on the "
            "others; train with model.batchnorm=inductive where they must not"
        )


@dataclass(frozen=True)
class Prediction:
    """What is said of one example.

    Args:
        name: of the example.
        klass: the likeliest class.
        probabilities: of each class by its name.
        truth: the class it is of, where it is told.
    """

    name: str
    klass: str
    probabilities: dict[str, float]
    truth: str | None = None


def adapt(
    run_dir: Path, support: Path, which: str = LATEST, stand_ins: dict[str, Any] | None = None, plain: bool = False
) -> Adapted:
    """The learner of a run, adapted to the examples of a folder or table.

    Args:
        run_dir: the run's directory; its data need not be there.
        support: a folder or zip with a folder of pictures for each class; or a table with columns ``text`` and
            ``label``, for runs that learned from texts.
        which: checkpoint, see :func:`metadist.finished.load_learner`.
        stand_ins: of what the run's config cannot name.
        plain: compute with torch's own operators alone, for exporting.

    Raises:
        MetadistError: there is no such run, the examples cannot be read, or there are more classes than the run's
            network can answer with.
    """
    learner, experiment, checkpoint = load_learner(run_dir, stand_ins, which, plain)
    inputs, tokens = reading_of(experiment)
    assert inputs.classes is not None
    given = read_examples(support, inputs, tokens, labelled=True)
    classes = sorted({str(c) for c in given.classes})
    if len(classes) < 2:
        raise DataError(support, f"holds {len(classes)} class", "give examples of two classes at least")
    if not learner.any_ways and len(classes) > inputs.classes:
        raise DataError(
            support,
            f"holds {len(classes)} classes, and the run's network answers with one of {inputs.classes}",
            f"leave some out, train with tasks.ways={len(classes)}, or train what takes any number, such as protonet",
        )
    y = torch.tensor([classes.index(str(c)) for c in given.classes])
    told = Learner(run_dir, learner, checkpoint.meta_params, checkpoint.version)
    model = adapted_model(told, Examples(given.x, y), len(classes))
    counts = Counter(str(c) for c in given.classes)
    shots, batchnorm = {c: counts[c] for c in classes}, learner.model.batchnorm
    return Adapted(run_dir, checkpoint.version, classes, shots, model, inputs, batchnorm, tokens)


def adapted_model(learner: Learner, support: Examples, ways: int) -> AdaptedModel:
    """A learner adapted to somebody's examples of ``ways`` classes, which come class after class."""
    algorithm = learner.algorithm.with_ways(ways)
    told = Learner(learner.run_dir, algorithm, learner.meta_params, learner.version)
    return told.adapt(_in_order(algorithm, support)).eval()


def _in_order(learner: Algorithm, support: Examples) -> Examples:
    """The support in an order that the learner was trained on: who must not see class after class gets it shuffled."""
    if not learner.wants_order or "by_class" in learner.wants_order:
        return support
    order = torch.from_numpy(Rng(0, "adapting/support").permutation(len(support.y)).copy())
    return Examples(support.x[order], support.y[order])


def predict(adapted: Adapted, query: Path) -> list[Prediction]:
    """What the adapted learner says of the examples of a folder, a picture or a table.

    Raises:
        MetadistError: they cannot be read.
    """
    given = read_examples(query, adapted.inputs, adapted.tokens, labelled=False)
    try:
        found = adapted.probabilities(given.x).tolist()
    except ValueError as e:  # what BatchNorm says of a single number
        if adapted.batchnorm != "transductive" or len(given.x) > 1:
            raise
        told = "is one example, and the run normalises those it is asked about by each other"
        raise DataError(query, told, "ask about several at once, or train with model.batchnorm=inductive") from e
    known = set(adapted.classes)
    return [
        Prediction(
            name, adapted.classes[int(np.argmax(row))], dict(zip(adapted.classes, row, strict=True)),
            truth if truth in known else None,
        )
        for name, row, truth in zip(given.names, found, given.classes, strict=True)
    ]  # fmt: skip


def accuracy_of(predictions: Sequence[Prediction]) -> float | None:
    """The share that is right, where all tell what they are."""
    if not predictions or any(p.truth is None for p in predictions):
        return None
    return sum(p.klass == p.truth for p in predictions) / len(predictions)


def as_json(adapted: Adapted, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """All of it, for programs."""
    told = [
        {"name": p.name, "class": p.klass, "probabilities": p.probabilities}
        | ({} if p.truth is None else {"truth": p.truth})
        for p in predictions
    ]
    return {
        "run_dir": str(adapted.run_dir), "version": adapted.version, "support": adapted.shots,
        "batchnorm": adapted.batchnorm, "accuracy": accuracy_of(predictions), "predictions": told,
    }  # fmt: skip


def write(path: Path, adapted: Adapted, predictions: Sequence[Prediction]) -> None:
    """Writes the predictions as JSON or CSV, by the file's suffix.

    Raises:
        DataError: the suffix is neither.
    """
    if path.suffix.lower() == ".json":
        write_for_a_person(path, json.dumps(as_json(adapted, predictions), indent=1) + "\n")
        return
    if path.suffix.lower() != ".csv":
        raise DataError(path, f"ends in {path.suffix!r}", "write to a name that ends in .csv or .json")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["name", "class", *(f"p({c})" for c in adapted.classes)])
    table.writerows([p.name, p.klass, *(f"{v:.6f}" for v in p.probabilities.values())] for p in predictions)
    write_for_a_person(path, text.getvalue())


# --------------------------------------------------------------------------- reading


def read_examples(source: Path, inputs: Inputs, tokens: Tokens | None, labelled: bool) -> Given:
    """Examples as a run's network takes them.

    Args:
        source: a folder, a zip, one picture; or a table of texts.
        inputs: what they are to look like.
        tokens: how texts are read, if the run learned from texts.
        labelled: whether each must tell its class.

    Raises:
        DataError: they cannot be read, or there are none.
    """
    if tokens is not None:
        return _texts(source, tokens, labelled)
    return _pictures(source, inputs, labelled)


def _pictures(source: Path, inputs: Inputs, labelled: bool) -> Given:
    if not source.exists():
        raise DataError(source, "is not there", "name a folder, a zip or a picture")
    if source.is_file() and source.suffix.lower() in IMAGE_SUFFIXES:
        one = SourceFile(PurePosixPath(source.name), str(source), file_reader(source))
        return _read_pictures([one], inputs, [None], source)
    with source_files(source) as files:
        files = [f for f in files if f.path.suffix.lower() in IMAGE_SUFFIXES]
        classes = ["/".join(f.path.parts[:-1]) or None for f in files]
        loose = [f for f, c in zip(files, classes, strict=True) if c is None]
        if labelled and loose:
            told = f"{loose[0].path} lies in it directly"
            raise DataError(source, told, "put each picture into the folder of its class")
        return _read_pictures(files, inputs, classes, source)


def _read_pictures(files: Sequence[SourceFile], inputs: Inputs, classes: Sequence[str | None], source: Path) -> Given:
    if not files:
        raise DataError(source, "holds no pictures", "give PNG, JPEG, WebP, BMP, GIF or TIFF files")
    x = torch.stack([as_input(file.read(), file.where, inputs) for file in files])
    return Given([str(f.path) for f in files], x, list(classes))


def as_input(data: bytes, where: str, inputs: Inputs) -> Tensor:
    """A picture's file as a run's network takes it, float32 ``[C, H, W]`` in [0, 1]: as ``data pack folder`` fits it.

    Raises:
        DataError: it cannot be read.
    """
    channels, height, width = inputs.x
    read = picture(data, where, "L" if channels == 1 else "RGB")
    pixels = np.array(fitted(read, (width, height)), dtype=np.uint8).reshape(height, width, channels).transpose(2, 0, 1)
    return torch.from_numpy(pixels).to(torch.float32) / 255


def _texts(source: Path, tokens: Tokens, labelled: bool) -> Given:
    if source.suffix.lower() == ".txt":
        try:
            lines = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(source, f"cannot be read ({e})", "give a file of UTF-8, a text in each line") from None
        rows = [(line, "") for line in lines]
        if labelled:
            raise DataError(source, "tells no classes", "give a table with the columns text and label")
    else:
        columns = ["text", "label"] if labelled else ["text"]
        tolerance = Tolerance(source, "rows")
        rows = [(v[0], v[1] if labelled else "") for _, v in read_rows(source, columns, tolerance)]
    if not rows:
        raise DataError(source, "holds no texts", "give one at least")
    x = torch.from_numpy(tokens([text for text, _ in rows]))
    return Given([text for text, _ in rows], x, [label or None for _, label in rows])


def reading_of(experiment: Experiment) -> tuple[Inputs, Tokens | None]:
    """What a run's inputs look like, and how texts are read if they are texts.

    Raises:
        ConfigError: the run does not tell classes apart, or its inputs are neither pictures nor texts.
    """
    inputs, section = experiment.inputs(), experiment.config.tasks
    if inputs.classes is None or inputs.y:
        told = f"of the run is {section.type}, which does not tell classes apart"
        raise ConfigError("tasks.type", told, "use md.load(RUN).adapt")
    if isinstance(section, TextTasksConfig):
        return inputs, Tokens(section.tokens, section.length, section.vocabulary)
    if not inputs.pictures:
        told = f"of the run have inputs {list(inputs.x)} of {inputs.x_dtype}, no pictures"
        raise ConfigError("tasks", told, "use md.load(RUN).adapt")
    return inputs, None
