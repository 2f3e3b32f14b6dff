"""Tasks of sentences: the same episode whoever asks, outsiders, and words that change their names."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from metadist.data import pack_arrays
from metadist.data.manifest import Field
from metadist.data.pack import pack_classes
from metadist.data.tokens import Tokens
from metadist.episode import PADDING
from metadist.errors import DataError
from metadist.seeding import Rng
from metadist.tasks.outsiders import OUTSIDE
from metadist.tasks.shards import ShardTasks
from metadist.tasks.texts import TextTasks

CLASSES, EACH = 12, 9
SPLITS = {"train": list(range(8)), "test": [8, 9, 10], "oos": [11]}


def sentence(klass: int, example: int) -> str:
    return f"class{klass} example{klass}x{example} common"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("texts") / "set"
    classes = [(f"k{c}", lambda c=c: [sentence(c, e).encode() for e in range(EACH)]) for c in range(CLASSES)]
    pack_classes(out, classes, SPLITS, Field("utf-8", ()), name="texts", block_examples=4)
    return out


def readings(tokens: Tokens = Tokens()) -> dict[tuple[int, ...], tuple[int, int]]:
    """Class and example of each sentence, by its tokens."""
    known = [(c, e) for c in range(CLASSES) for e in range(EACH)]
    return {tuple(row): ce for row, ce in zip(tokens([sentence(*ce) for ce in known]).tolist(), known, strict=True)}


def shown(x: torch.Tensor) -> list[tuple[int, int]]:
    read = readings()
    return [read[tuple(row)] for row in x.tolist()]


def test_shapes_labels_and_order(packed: Path) -> None:
    batch = TextTasks(packed, 3, 2, 4).episodes(0, "train", [0, 5, 9])
    assert batch.support.x.shape == (3, 6, 32) and batch.support.x.dtype == torch.int64
    assert batch.query.x.shape == (3, 12, 32) and batch.query.y.dtype == torch.int64
    for episode in batch:
        assert episode.support.y.tolist() == [0, 0, 1, 1, 2, 2]
        classes = [int(name[1:]) for name in episode.info["classes"]]
        assert len(set(classes)) == 3 and set(classes) <= set(range(8))
        support, query = shown(episode.support.x), shown(episode.query.x)
        assert [c for c, _ in support] == [classes[y] for y in episode.support.y]
        assert [c for c, _ in query] == [classes[y] for y in episode.query.y]
        assert len({*support, *query}) == 18, "no example is shown twice"


def test_an_episode_is_the_same_whoever_asks(packed: Path) -> None:
    tasks = TextTasks(packed, 3, 1, 2, outsiders=2, renamed=0.3)
    batch = tasks.episodes(3, "train", [7, 2, 40])
    for place, number in enumerate([7, 2, 40]):
        for source in (tasks, pickle.loads(pickle.dumps(tasks))):
            other = source.sample(Rng(3, "train", number))
            for part in ("support", "query"):
                for one, two in zip(getattr(other, part), getattr(batch[place], part), strict=True):
                    assert torch.equal(one, two)


@pytest.mark.parametrize(("source", "allowed"), [("oos", {11}), (None, {8, 9, 10})])
def test_outsiders_are_of_none_of_the_classes_and_change_nothing_else(
    packed: Path, source: str | None, allowed: set[int]
) -> None:
    plain = TextTasks(packed, 2, 1, 3, "test").episodes(0, "e", range(20))
    tasks = TextTasks(packed, 2, 1, 3, "test", outsiders=4, outsiders_from=source)
    seen = set()
    for before, after in zip(plain, tasks.episodes(0, "e", range(20)), strict=True):
        assert torch.equal(before.support.x, after.support.x) and torch.equal(before.query.x, after.query.x[:6])
        assert after.query.y.tolist() == [0] * 3 + [1] * 3 + [OUTSIDE] * 4
        outside = shown(after.query.x[6:])
        assert len(set(outside)) == 4, "four different ones"
        inside = {int(name[1:]) for name in after.info["classes"]}
        assert not inside & {c for c, _ in outside}
        seen |= {c for c, _ in outside}
    assert seen == allowed


def test_more_outsiders_than_there_are(packed: Path) -> None:
    with pytest.raises(DataError, match=r"evaluation.outsiders: 10 wanted, but there are 9 .* tasks.outsiders_from"):
        TextTasks(packed, 2, 1, 1, outsiders=10, outsiders_from="oos").episodes(0, "e", [0])


def test_renamed_words_are_others_throughout_an_episode_of_training_alone(packed: Path) -> None:
    plain = TextTasks(packed, 3, 2, 4).episodes(0, "train", range(30))
    tasks = TextTasks(packed, 3, 2, 4, renamed=0.5)
    kept = []
    for before, after in zip(plain, tasks.episodes(0, "train", range(30)), strict=True):
        names: dict[int, int] = {}
        for part in ("support", "query"):
            old, new = getattr(before, part).x.flatten().tolist(), getattr(after, part).x.flatten().tolist()
            for a, b in zip(old, new, strict=True):
                assert names.setdefault(a, b) == b, "one name throughout the episode"
        assert names.pop(PADDING) == PADDING
        kept += [a == b for a, b in names.items()]
    assert 0.4 < np.mean(kept) < 0.6
    other = [t.split("test").episodes(0, "e", [0]).support.x for t in (tasks, TextTasks(packed, 3, 2, 4))]
    assert torch.equal(*other)


def test_pictures_and_texts_are_told_apart(packed: Path, tmp_path: Path) -> None:
    pack_arrays(np.zeros((2, 3, 4, 4), np.uint8), ["a", "b"], {"train": [0, 1]}, tmp_path / "pictures")
    with pytest.raises(DataError, match="holds pictures, not texts; use tasks.type: shards"):
        TextTasks(tmp_path / "pictures", 2, 1, 1)
    with pytest.raises(DataError, match="holds text, not images; .*tasks.type: texts"):
        ShardTasks(packed, 2, 1, 1)
    with pytest.raises(DataError, match="tasks.ways: 9 ways, but split 'train' has 8 classes; ask for at most 8"):
        TextTasks(packed, 9, 1, 1)
