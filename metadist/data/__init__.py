"""Shard sets: packing, checking, and drawing episodes from them.

:class:`~metadist.data.stream.EpisodeStream` is imported from its own module, since it needs ``webdataset``.
"""

from metadist.data.clinc150 import pack_clinc150
from metadist.data.features import FeatureTable
from metadist.data.folders import pack_folder
from metadist.data.labelled import LabelTable
from metadist.data.manifest import Field, Manifest, load_manifest
from metadist.data.npz import pack_npz
from metadist.data.omniglot import pack_omniglot
from metadist.data.pack import pack_arrays, pack_classes
from metadist.data.prefetch import Prefetch
from metadist.data.ratings import Columns, pack_ratings
from metadist.data.samplers import ClassPool, Draws, UniformSampler, WindowSampler
from metadist.data.shards import ShardSet
from metadist.data.texts import pack_csv
from metadist.data.verify import Report, bad_blocks, class_of, info, verify
from metadist.data.writer import ShardWriter, seal

__all__ = [
    "ClassPool",
    "Columns",
    "Draws",
    "FeatureTable",
    "Field",
    "LabelTable",
    "Manifest",
    "Prefetch",
    "Report",
    "ShardSet",
    "ShardWriter",
    "UniformSampler",
    "WindowSampler",
    "info",
    "pack_arrays",
    "pack_classes",
    "pack_clinc150",
    "pack_csv",
    "pack_folder",
    "pack_npz",
    "pack_omniglot",
    "pack_ratings",
    "seal",
    "verify",
    "bad_blocks",
    "class_of",
    "load_manifest",
]
