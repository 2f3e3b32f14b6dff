"""Tasks over a shard set: shapes, order, turns, and the same episode whoever asks."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metadist.data import pack_arrays
from metadist.data.manifest import Field
from metadist.data.pack import pack_classes
from metadist.errors import DataError
from metadist.seeding import Rng
from metadist.tasks.shards import ShardTasks

WINDOW = {"type": "window", "blocks": 7, "reuse": 0.5}
SPLITS = {"train": list(range(8)), "validation": [8, 9], "test": [10, 11]}


def coded(classes: int = 12, examples: int = 6) -> np.ndarray:
    """uint8 ``[classes, examples, 4, 4]``: the top left pixel tells the class, the next the example."""
    images = np.zeros((classes, examples, 4, 4), dtype=np.uint8)
    images[..., 0, 0] = 10 + np.arange(classes)[:, None]
    images[..., 0, 1] = 100 + np.arange(examples)
    return images


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tasks") / "coded"
    pack_arrays(coded(), [f"k{i}" for i in range(12)], SPLITS, out, block_examples=6)
    return out


def pixels(x: torch.Tensor, row: int, column: int) -> list[int]:
    return [round(v * 255) for v in x[:, 0, row, column].tolist()]


@pytest.mark.parametrize("sampler", ["uniform", WINDOW])
def test_shapes_labels_and_order(packed: Path, sampler: Any) -> None:
    tasks = ShardTasks(packed, 3, 2, 4, sampler=sampler)
    batch = tasks.episodes(0, "train", [0, 5, 9])
    assert batch.support.x.shape == (3, 6, 1, 4, 4) and batch.support.x.dtype == torch.float32
    assert batch.query.x.shape == (3, 12, 1, 4, 4) and batch.query.y.dtype == torch.int64
    assert batch.support.x.min() >= 0 and batch.support.x.max() <= 1
    for episode in batch:
        assert episode.support.y.tolist() == [0, 0, 1, 1, 2, 2]
        assert episode.query.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        classes = [int(name[1:]) for name in episode.info["classes"]]
        assert len(set(classes)) == 3 and set(classes) <= set(range(8))
        assert pixels(episode.support.x, 0, 0) == [10 + classes[y] for y in episode.support.y]
        assert pixels(episode.query.x, 0, 0) == [10 + classes[y] for y in episode.query.y]
        for way in range(3):
            shown = [*pixels(episode.support.x[episode.support.y == way], 0, 1)]
            shown += pixels(episode.query.x[episode.query.y == way], 0, 1)
            assert sorted(shown) == [100, 101, 102, 103, 104, 105]  # no example is in both sets


@pytest.mark.parametrize("rotations", ["classes", "task"])
def test_examples_of_a_class_are_turned_alike(packed: Path, rotations: str) -> None:
    tasks = ShardTasks(packed, 3, 2, 2, rotations=rotations)
    corners = {0: (0, 0), 90: (3, 0), 180: (3, 3), 270: (0, 3)}  # where the top left goes, counter-clockwise
    seen = set()
    for episode in tasks.episodes(0, "train", range(40)):
        for way, (name, turn) in enumerate(zip(episode.info["classes"], episode.info["turns"], strict=True)):
            seen.add(turn)
            both = torch.cat([episode.support.x[episode.support.y == way], episode.query.x[episode.query.y == way]])
            assert pixels(both, *corners[turn]) == [10 + int(name[1:])] * 4
    assert seen == {0, 90, 180, 270}


def test_turned_classes_are_classes_of_their_own(packed: Path) -> None:
    tasks = ShardTasks(packed, 3, 2, 2, rotations="classes")
    assert tasks.describe()["classes"] == 32
    pairs = [list(zip(e.info["classes"], e.info["turns"], strict=True)) for e in tasks.episodes(0, "train", range(300))]
    assert all(len(set(p)) == 3 for p in pairs)
    assert len({q for p in pairs for q in p}) == 32  # every class turns up
    assert any(len({name for name, _ in p}) < 3 for p in pairs)  # two turns of one character may meet


def test_colour_images_come_channels_first(tmp_path: Path) -> None:
    images = np.zeros((3, 4, 5, 6, 3), dtype=np.uint8)
    images[..., 1] = 255
    pack_arrays(images, ["a", "b", "c"], {"train": [0, 1, 2]}, tmp_path / "out")
    x = ShardTasks(tmp_path / "out", 2, 1, 1).episodes(0, "train", [0]).support.x
    assert x.shape == (1, 2, 3, 5, 6) and x.mean(dim=(0, 1, 3, 4)).tolist() == [0, 1, 0]


@pytest.mark.parametrize("sampler", ["uniform", WINDOW])
@pytest.mark.parametrize("rotations", ["none", "classes", "task"])
def test_resident_and_indexed_and_sampled_are_one(packed: Path, sampler: Any, rotations: str) -> None:
    make = {r: ShardTasks(packed, 3, 2, 2, sampler=sampler, rotations=rotations, resident=r) for r in (True, False)}
    numbers = [100_000, 3, 4, 3]
    a, b = (make[r].episodes(1, "s", numbers) for r in (True, False))
    assert torch.equal(a.support.x, b.support.x) and torch.equal(a.query.x, b.query.x) and a.info == b.info
    sent = pickle.loads(pickle.dumps(make[True])).episodes(1, "s", numbers)
    assert torch.equal(a.query.x, sent.query.x)
    for row, e in enumerate(numbers):
        alone = make[True].sample(Rng(1, "s", e))
        assert torch.equal(alone.support.x, a[row].support.x) and torch.equal(alone.query.x, a[row].query.x)


def test_a_pickled_source_is_small(packed: Path) -> None:
    tasks = ShardTasks(packed, 3, 2, 2, resident=True)
    assert len(pickle.dumps(tasks)) < 20_000


@given(numbers=st.lists(st.integers(0, 2**40), min_size=1, max_size=6), seed=st.integers(0, 2**64 - 1))
def test_an_episode_does_not_depend_on_its_batch(packed: Path, numbers: list[int], seed: int) -> None:
    tasks = ShardTasks(packed, 2, 1, 1, rotations="task")
    batch = tasks.episodes(seed, "s", numbers)
    for row, e in enumerate(numbers):
        assert torch.equal(batch.query.x[row], tasks.episodes(seed, "s", [e]).query.x[0])


def test_seed_and_stream_matter(packed: Path) -> None:
    tasks = ShardTasks(packed, 3, 1, 1)
    infos = [tasks.episodes(seed, stream, range(20)).info for seed, stream in ((0, "a"), (1, "a"), (0, "b"))]
    assert infos[0] != infos[1] and infos[0] != infos[2]


def test_splits_share_no_class_and_every_class_turns_up(packed: Path) -> None:
    seen = {}
    tasks = ShardTasks(packed, 2, 1, 1, resident=True)
    for split, members in SPLITS.items():
        batch = tasks.split(split).episodes(0, split, range(60))
        seen[split] = {name for info in batch.info for name in info["classes"]}
        assert seen[split] == {f"k{c}" for c in members}
    assert ShardTasks(packed, 2, 1, 1, split="train+validation").describe()["classes"] == 10
    assert tasks.split_name == "train"


def test_describe_says_what_a_run_should_keep(packed: Path) -> None:
    told = ShardTasks(packed, 2, 1, 1, sampler={"type": "window", "blocks": 5}).describe()
    assert told["content_id"].startswith("sha256:") and told["sampler"] == {"type": "window", "blocks": 5, "reuse": 0.5}
    assert (told["split"], told["classes"], told["examples"], told["shape"]) == ("train", 8, 48, [4, 4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 9}, "tasks.ways: 9 ways, but split 'train' has 8 classes; ask for at most 8"),
        ({"ways": 33, "rotations": "classes"}, "split 'train' has 32 classes (quarter turns counted)"),
        ({"ways": 0}, "tasks.ways: 0 is too few; it must be at least 1"),
        ({"shots": 0}, "tasks.shots: 0 is too few"),
        (
            {"shots": 5},
            "tasks.shots + tasks.query_shots: 7 examples of each class, but the whole of class 'k0' holds 6",
        ),
        ({"shots": 5, "sampler": WINDOW}, "7 examples of each class, but a block of class 'k0' holds 6"),
        ({"sampler": {"type": "window", "blocks": 3}}, "tasks.sampler.blocks: a window of 3 blocks may hold only 2"),
        ({"sampler": {"type": "window", "block": 3}}, "tasks.sampler.block: the window sampler has no such option"),
        ({"sampler": {"type": "window", "blocks": 3.5}}, "tasks.sampler.blocks: 3.5 is not a whole number"),
        ({"sampler": {"type": "window", "reuse": "a"}}, "tasks.sampler.reuse: 'a' is not a number"),
        ({"sampler": "best"}, "tasks.sampler: 'best' is no sampler; use 'uniform' or 'window'"),
        ({"rotations": "all"}, "tasks.rotations: 'all' is none of none, classes, task"),
        ({"resident": "no"}, "tasks.resident: 'no' is none of true, false, auto"),
        ({"split": "dev"}, "has no split 'dev'; it has test, train, validation"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(packed: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        ShardTasks(packed, **{"ways": 3, "shots": 1, "query_shots": 2, **options})
    assert message in str(error.value)


def test_a_missing_set_and_a_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: no such shard set; make one with `metadist data pack`"):
        ShardTasks(tmp_path / "gone", 3, 1, 1)
    with pytest.raises(DataError, match="not a shard set: it has no metadist.json"):
        ShardTasks(tmp_path, 3, 1, 1)


def test_images_that_cannot_be_turned_and_texts_are_refused(tmp_path: Path) -> None:
    pack_arrays(np.zeros((3, 4, 5, 6), np.uint8), ["a", "b", "c"], {"train": [0, 1, 2]}, tmp_path / "wide")
    with pytest.raises(DataError, match=r"tasks.rotations: 'task' needs square images, but these are \[5, 6\]"):
        ShardTasks(tmp_path / "wide", 2, 1, 1, rotations="task")
    texts = [("a", lambda: [b"x", b"y"]), ("b", lambda: [b"z", b"w"])]
    pack_classes(tmp_path / "texts", texts, {"train": [0, 1]}, Field("utf-8"), name="texts")
    with pytest.raises(DataError, match="holds text, not images"):
        ShardTasks(tmp_path / "texts", 2, 1, 1)


def damaged(tmp_path: Path, change: Any) -> Path:
    out = tmp_path / "damaged"
    pack_arrays(coded(), [f"k{i}" for i in range(12)], SPLITS, out, block_examples=6)
    shard = out / "shard-00000.tar"
    shard.write_bytes(change(bytearray(shard.read_bytes())))
    return out


def test_a_truncated_shard_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shard-00000.tar: is cut: 3000 bytes of \d+"):
        ShardTasks(damaged(tmp_path, lambda data: data[:3000]), 3, 1, 1)


def test_an_altered_block_is_refused_at_once_or_when_read(tmp_path: Path) -> None:
    def change(data: bytearray) -> bytearray:
        at = data.index(bytes([10, 100]))  # the first pixels of class 0
        data[at] ^= 1
        return data

    path = damaged(tmp_path, change)
    message = r"shard-00000.tar:c00000-0000.x.npy: altered: its crc32 is not the index's"
    with pytest.raises(DataError, match=message):
        ShardTasks(path, 3, 1, 1, resident=True)
    indexed = ShardTasks(path, 3, 1, 1, resident=False)
    with pytest.raises(DataError, match=message):
        indexed.episodes(0, "train", range(50))


def test_no_episodes_is_refused(packed: Path) -> None:
    with pytest.raises(ValueError, match="zero episodes"):
        ShardTasks(packed, 3, 1, 1).episodes(0, "s", [])


def test_real_omniglot_every_class_turns_up(omniglot_shards: Path) -> None:
    for split, classes in (("train", 4112), ("validation", 688), ("test", 1692)):
        tasks = ShardTasks(omniglot_shards, 5, 1, 1, split=split, rotations="classes")
        drawn = tasks.sampler.draw(0, split, range(12 * classes // 5)).classes
        assert tasks.describe()["classes"] == classes == len(np.unique(drawn))
