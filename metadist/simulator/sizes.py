"""How many numbers a config's model has, told without building it, which would take torch and the data."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from metadist.config.schema import Config

_GLYPH = (1, 28, 28)


def numbers_of(config: Config) -> int | None:
    """Numbers in the meta-parameters, to a few per cent; None where only building the model can tell."""
    shape, outputs = _inputs(config), _outputs(config)
    if shape is None or config.algorithm.type in ("custom", "python", "mann", "snail"):
        return None
    model = config.model
    if model.type == "mlp":
        found = _mlp([shape[0] * shape[1] * shape[2], *model.hidden, outputs])
    elif model.type == "conv4":
        positions = 1 if model.downsample == "stride" else (shape[1] // 16) * (shape[2] // 16)
        found = _convolutions([shape[0], *[model.filters] * 4]) + _mlp([positions * model.filters, outputs])
    elif model.type == "resnet12":
        sizes = [shape[0], *model.widths]
        blocks = sum(_convolutions([a, b, b, b]) + a * b + 2 * b for a, b in itertools.pairwise(sizes))
        found = blocks + _mlp([sizes[-1], outputs])
    else:
        return None
    return 2 * found if config.algorithm.type == "meta_sgd" else found


def _mlp(sizes: list[int]) -> int:
    return sum(a * b + b for a, b in itertools.pairwise(sizes))


def _convolutions(channels: list[int]) -> int:
    """Of 3x3 convolutions without bias, each with BatchNorm."""
    return sum(9 * a * b + 2 * b for a, b in itertools.pairwise(channels))


def _outputs(config: Config) -> int:
    return int(getattr(config.tasks, "ways", 1))


def _inputs(config: Config) -> tuple[int, int, int] | None:
    """Channels, height and width."""
    tasks = config.tasks
    if tasks.type == "sinusoid":
        return 1, 1, 1
    if tasks.type == "glyphs":
        return _GLYPH
    if tasks.type == "shards":
        try:
            shape = json.loads((Path(tasks.path) / "metadist.json").read_text())["fields"]["x"]["shape"]
            height, width, channels = (int(n) for n in [*shape, 1][:3])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return channels, height, width
    return None
