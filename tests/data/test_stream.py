"""The stream is a WebDataset pipeline, starts anywhere by arithmetic, and heeds no environment."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
import webdataset as wds
from shard_sets import flip, payload_byte, shard_paths
from torch.utils.data import DataLoader

from metadist.data import ShardSet, UniformSampler, WindowSampler
from metadist.data.stream import EpisodeStream
from metadist.episode import Episode
from metadist.errors import DataError
from metadist.tasks.shards import ShardTasks

SAMPLERS = ("uniform", "window")
# Of the first 200 episodes of ``stream_of``, their images, labels and info.
KNOWN = {
    "uniform": "d0569b914be74f8b9b6cfebf1e7d39c3e90de1191896fe4469d2f8fdae59c520",
    "window": "2932f6fe3d31c0e407496b28230024dec1734fa431fb2f7e5554b1a94e7fa72d",
}


def stream_of(path: Path, kind: str, start: int = 0) -> EpisodeStream:
    shards = ShardSet(path)
    pool = shards.pool("train", turned=True)
    sampler = UniformSampler(pool, 3, 3) if kind == "uniform" else WindowSampler(pool, 3, 3, window=9, reuse=0.5)
    return EpisodeStream(shards, sampler, shots=1, seed=5, start=start)


def numbers(episodes: object) -> list[int]:
    return [e.info["episode"] for e in episodes]  # type: ignore[attr-defined]


def same(a: Episode, b: Episode) -> bool:
    return all(torch.equal(x, y) for x, y in zip((*a.support, *a.query), (*b.support, *b.query), strict=True))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_seek_equals_replay(packed: Path, kind: str) -> None:
    stream = stream_of(packed, kind)
    replayed = list(islice(stream, 400))
    for e in (0, 1, 57, 399):
        assert same(next(iter(stream.seek(e))), replayed[e])
    assert numbers(islice(stream.seek(57), 3)) == [57, 58, 59]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_episode_100_000_by_seek_equals_replay(packed: Path, kind: str) -> None:
    """The replay is of the blocks: every one that a window has held since 99,000 goes by, and the draw agrees."""
    stream = stream_of(packed, kind)
    begun = time.monotonic()
    sought = next(iter(stream.seek(100_000)))
    assert time.monotonic() - begun < 1
    assert same(sought, next(islice(stream.seek(99_000), 1000, None)))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_stream_and_task_source_give_the_same_episodes(packed: Path, kind: str) -> None:
    sampler = "uniform" if kind == "uniform" else {"type": "window", "blocks": 9, "reuse": 0.5}
    tasks = ShardTasks(packed, 3, 1, 2, sampler=sampler, rotations="classes")
    for e, episode in enumerate(islice(stream_of(packed, kind), 30)):
        other = tasks.episodes(5, "train", [e])[0]
        assert same(episode, other) and episode.info["classes"] == other.info["classes"]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_rank_and_world_size_change_nothing(packed: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = list(islice(stream_of(packed, kind), 5))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranked = list(islice(stream_of(packed, kind), 5))
    assert all(same(a, b) for a, b in zip(plain, ranked, strict=True))


def test_it_is_a_webdataset_pipeline_to_add_to(packed: Path) -> None:
    stream = stream_of(packed, "uniform")
    assert isinstance(stream, wds.DataPipeline)
    shapes = stream.map(lambda e: tuple(e.query.x.shape)).slice(3).prefetch(2)
    assert list(shapes) == [(6, 1, 4, 4)] * 3
    even = stream.select(lambda e: e.info["episode"] % 2 == 0).seek(10)
    assert numbers(islice(even, 3)) == [10, 12, 14]


def test_data_loader_workers_share_the_episodes_in_order(packed: Path) -> None:
    loader = DataLoader(stream_of(packed, "window").slice(3), batch_size=None, num_workers=2)
    assert numbers(loader) == [0, 1, 2, 3, 4, 5]
    alone = list(islice(stream_of(packed, "window"), 6))
    assert all(same(a, b) for a, b in zip(loader, alone, strict=True))


def test_prefetch_carries_a_damaged_block_to_the_reader(spoilt: Path) -> None:
    flip(shard_paths(spoilt)[0], payload_byte(spoilt))
    stream = stream_of(spoilt, "uniform").prefetch(2)
    with pytest.raises(DataError, match="altered: its crc32"):
        for _ in islice(stream, 200):
            pass
    stream.close()


def test_close_stops_a_stream_that_reads_ahead(packed: Path) -> None:
    stream = stream_of(packed, "window").prefetch(2)
    reading = iter(stream)
    next(reading)
    assert [t for t in threading.enumerate() if t.name == "metadist-prefetch"]
    stream.close()
    assert list(reading) == []
    assert not [t for t in threading.enumerate() if t.name == "metadist-prefetch"]


def test_window_holds_no_more_blocks_than_its_slots(packed: Path) -> None:
    reads: list[int] = []
    stream = stream_of(packed, "window")
    raw = stream.plan.shards.raw
    stream.plan.shards.raw = lambda b: reads.append(b) or raw(b)  # type: ignore[method-assign, func-returns-value]
    list(islice(stream, 101))
    assert len(reads) == 9 + 50  # the first window, then one block every second episode


@pytest.mark.parametrize("kind", SAMPLERS)
def test_known_episodes(packed: Path, kind: str) -> None:
    digest = hashlib.sha256()
    for episode in islice(stream_of(packed, kind), 200):
        for t in (*episode.support, *episode.query):
            digest.update(t.numpy().tobytes())
        digest.update(repr(dict(episode.info)).encode())
    assert digest.hexdigest() == KNOWN[kind]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_an_episode_is_drawn_once_and_many_together(packed: Path, kind: str) -> None:
    stream = stream_of(packed, kind)
    drawn: list[int] = []
    draw = stream.plan.sampler.draw
    stream.plan.sampler.draw = lambda seed, s, e: drawn.extend(e) or draw(seed, s, e)  # type: ignore
    list(islice(stream.seek(10), 100))
    assert drawn == list(range(10, 10 + 2 * 64))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_nothing_is_read_before_the_episode_that_needs_it(spoilt: Path, kind: str) -> None:
    flip(shard_paths(spoilt)[0], payload_byte(spoilt))
    stream = stream_of(spoilt, kind)
    plan, served, last = stream.plan, 0, None
    for wanted in range(500):  # the first episode that brings in the damaged block 2
        if 2 in plan.sampler.incoming(5, "train", wanted, last):
            break
        last = wanted
    with pytest.raises(DataError, match="altered: its crc32"):
        for _ in stream:
            served += 1
    assert served == wanted


def test_uniform_episodes_read_a_block_again_only_if_it_was_not_kept(packed: Path) -> None:
    whole = list(islice(stream_of(packed, "uniform"), 100))
    for cache_bytes, most in ((256 << 20, 14), (100, 1000)):
        stream, reads = stream_of(packed, "uniform"), []
        shards, raw = stream.plan.shards, stream.plan.shards.raw
        shards.cache_bytes = cache_bytes  # 14 blocks of 48 bytes, or 2
        shards.raw = lambda b: reads.append(b) or raw(b)  # type: ignore  # noqa: B023
        assert all(same(a, b) for a, b in zip(islice(stream, 100), whole, strict=True))
        assert len(reads) <= most and (most == 14) == (len(set(reads)) == len(reads))


def test_episodes_do_not_share_memory(packed: Path) -> None:
    first, *others = islice(stream_of(packed, "uniform"), 20)
    kept = [t.clone() for e in others for t in (*e.support, *e.query)]
    for t in (*first.support, *first.query):
        t.fill_(9)
    assert all(
        torch.equal(a, b) for a, b in zip(kept, (t for e in others for t in (*e.support, *e.query)), strict=True)
    )
    assert next(iter(stream_of(packed, "uniform"))).support.y.tolist() == [0, 1, 2]


def test_a_negative_episode_is_refused(packed: Path) -> None:
    with pytest.raises(ValueError, match="episode -1 does not exist"):
        stream_of(packed, "uniform").seek(-1)


def test_the_core_does_not_import_webdataset() -> None:
    code = "import sys, metadist.data, metadist.tasks.shards; sys.exit('webdataset' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
