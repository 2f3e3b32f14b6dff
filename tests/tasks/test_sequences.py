"""Orders and labels of episodes: functions of the episode alone, and of nothing but what they should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from metadist.data import pack_arrays
from metadist.episode import Episode
from metadist.errors import ConfigError
from metadist.seeding import Rng
from metadist.tasks.base import TaskSource
from metadist.tasks.glyphs import GlyphTasks
from metadist.tasks.shards import ShardTasks

WAYS, SHOTS, QUERY = 4, 2, 3


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight classes of six examples, all different."""
    out = tmp_path_factory.mktemp("sequences") / "set"
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 4, 4), dtype=np.uint8)
    pack_arrays(images, [f"k{i}" for i in range(8)], {"train": list(range(8))}, out)
    return out


@pytest.fixture(params=["shards", "glyphs"])
def make(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """Makes a source with an order and labels."""
    if request.param == "glyphs":
        return lambda **how: GlyphTasks(WAYS, SHOTS, QUERY, **how)
    path = request.getfixturevalue("packed")
    return lambda **how: ShardTasks(path, WAYS, SHOTS, QUERY, **how)


def shown(episode: Episode) -> list[tuple[bytes, bytes]]:
    """Inputs and targets in the order of the sequence."""
    sets = (episode.support, episode.query)
    return [(x.numpy().tobytes(), y.numpy().tobytes()) for s in sets for x, y in zip(s.x, s.y, strict=True)]


@pytest.mark.parametrize("order", ["within_sets", "shuffled"])
def test_an_order_is_a_permutation_of_the_same_examples(make, order):  # type: ignore[no-untyped-def]
    plain, mixed = (make(order=o).episodes(3, "train", range(12)) for o in ("by_class", order))
    assert plain.info == mixed.info
    moved = []
    for a, b in zip(plain, mixed, strict=True):
        assert len(a.support.x) == len(b.support.x) and sorted(shown(a)) == sorted(shown(b))
        inside = sorted(shown(a)[: len(a.support.x)]) == sorted(shown(b)[: len(b.support.x)])
        assert inside or order == "shuffled"
        moved.append((shown(a) != shown(b), inside))
    assert all(m for m, _ in moved) and all(i for _, i in moved) == (order == "within_sets")
    assert len({tuple(e.support.y.tolist()) for e in mixed}) > 6, "the order is the same in every episode"


@pytest.mark.parametrize("labels", ["index", "letters"])
def test_order_and_labels_are_functions_of_the_episode(make, labels):  # type: ignore[no-untyped-def]
    source: TaskSource = make(order="shuffled", labels=labels)
    batch = source.episodes(5, "train", [100_000, 3])
    assert shown(batch[1]) == shown(source.episodes(5, "train", [3])[0]) == shown(source.sample(Rng(5, "train", 3)))
    assert shown(batch[1]) == shown(source.split("train").sample(Rng(5, "train", 3)))
    for other in (source.episodes(6, "train", [3]), source.episodes(5, "test", [3]), source.episodes(5, "train", [4])):
        assert shown(batch[1]) != shown(other[0])


def test_letters_are_strings_drawn_anew_for_each_episode(make):  # type: ignore[no-untyped-def]
    plain, named = (make(labels=labels).episodes(0, "train", range(20)) for labels in ("index", "letters"))
    for part, of in ((named.support, plain.support), (named.query, plain.query)):
        assert part.y.shape == (*of.y.shape, 5) and part.y.dtype == torch.int64
        assert part.y.min() == 0 and part.y.max() == 4 and torch.equal(part.x, of.x)
    names = []
    for a, b in zip(plain, named, strict=True):
        pairs = {(int(i), tuple(s.tolist())) for part in ("support", "query")
                 for i, s in zip(getattr(a, part).y, getattr(b, part).y, strict=True)}  # fmt: skip
        assert len(pairs) == len({i for i, _ in pairs}) == len({s for _, s in pairs}) == WAYS
        names.append(tuple(sorted(pairs)))
    assert len(set(names)) == 20, "two episodes have the same strings"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"order": "sorted"}, r"^tasks\.order: is 'sorted'; choose one of by_class, within_sets, shuffled$"),
        ({"labels": "words"}, r"^tasks\.labels: is 'words'; choose one of index, letters$"),
    ],
)
def test_what_is_not_there_is_refused(make, how, message):  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        make(**how)
