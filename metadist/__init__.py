"""metadist: learning to learn across many tasks, from a laptop to a GPU cluster.

Needs torch alone, and loads even that when one of its names is first used, so that checking a config is
quick; Ray, WebDataset and Weights & Biases are loaded when a run needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metadist.algorithms import (
        ANIL,
        BOIL,
        CAVIA,
        ES,
        IMAML,
        MAML,
        MANN,
        PES,
        SNAIL,
        Algorithm,
        MAMLPlusPlus,
        MatchingNet,
        MetaSGD,
        ProtoMAML,
        ProtoNet,
        Reptile,
        Rule,
        TaskResults,
    )
    from metadist.api import AdaptedModel, Learner, LocalRuntime, Outer, RayRuntime, Run, load, train
    from metadist.episode import Episode, EpisodeBatch, Examples
    from metadist.errors import MetadistError
    from metadist.inner import gradients
    from metadist.models import MLP, Conv4, RatingModel, ResNet12, TextBag, TextConv, TextTransformer
    from metadist.seeding import Rng
    from metadist.tasks.base import TaskSource
    from metadist.tasks.glyphs import GlyphTasks
    from metadist.tasks.ratings import RatingTasks
    from metadist.tasks.shards import ShardTasks
    from metadist.tasks.sinusoid import SinusoidTasks
    from metadist.tasks.texts import TextTasks

__version__ = "0.1.0"

_HOMES = {
    "metadist.algorithms": (
        "ANIL", "BOIL", "CAVIA", "ES", "IMAML", "MAML", "MANN", "PES", "SNAIL", "Algorithm", "MAMLPlusPlus",
        "MatchingNet", "MetaSGD", "ProtoMAML", "ProtoNet", "Reptile", "Rule", "TaskResults",
    ),
    "metadist.api": ("AdaptedModel", "Learner", "LocalRuntime", "Outer", "RayRuntime", "Run", "load", "train"),
    "metadist.episode": ("Episode", "EpisodeBatch", "Examples"),
    "metadist.errors": ("MetadistError",),
    "metadist.inner": ("gradients",),
    "metadist.models": ("MLP", "Conv4", "RatingModel", "ResNet12", "TextBag", "TextConv", "TextTransformer"),
    "metadist.seeding": ("Rng",),
    "metadist.tasks.base": ("TaskSource",),
    "metadist.tasks.glyphs": ("GlyphTasks",),
    "metadist.tasks.ratings": ("RatingTasks",),
    "metadist.tasks.shards": ("ShardTasks",),
    "metadist.tasks.sinusoid": ("SinusoidTasks",),
    "metadist.tasks.texts": ("TextTasks",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ANIL", "BOIL", "CAVIA", "ES", "IMAML", "MAML", "MANN", "MLP", "PES", "SNAIL", "AdaptedModel", "Algorithm",
    "Conv4", "Episode", "EpisodeBatch", "Examples", "GlyphTasks", "Learner", "LocalRuntime", "MAMLPlusPlus",
    "MatchingNet", "MetaSGD", "MetadistError", "Outer", "ProtoMAML", "ProtoNet", "RatingModel", "RatingTasks",
    "RayRuntime", "Reptile", "ResNet12", "Rng", "Rule", "Run", "ShardTasks", "SinusoidTasks", "TaskResults",
    "TaskSource", "TextBag", "TextConv", "TextTasks", "TextTransformer", "gradients", "load", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
