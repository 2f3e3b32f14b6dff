"""A parameter server in shards makes what one server makes, to the bit; and its shards are about equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadist.config.schema import OuterConfig
from metadist.outer.gradient import partial_sums
from metadist.outer.partition import cut, joined_snapshot, part_of_options, part_of_snapshot
from metadist.outer.update import chunk_starts, norm_of
from metadist.server import ParameterServer

CHUNK = 1 << 16
SIZES = [*[1001] * 40, 3 * CHUNK + 11, 5, 0, 70_003, 1, 2 * CHUNK, *[999] * 70]
NUMEL, MICROBATCHES, TASKS = sum(SIZES), 5, 10
RULES = [
    (10, 20, {"kind": "average", "rate": 0.25}),
    (NUMEL // 2 - 50_000, NUMEL // 2 + 50_000, {"kind": "replace", "rate": 1.0}),
]


@given(st.lists(st.integers(0, 4 * CHUNK), min_size=1, max_size=12).filter(any), st.integers(1, 9))
def test_shards_are_consecutive_whole_and_as_equal_as_the_places_to_cut_allow(sizes: list[int], shards: int) -> None:
    cuts = cut(sizes, shards)
    assert cuts[0][0] == 0 and cuts[-1][1] == sum(sizes) and 1 <= len(cuts) <= shards
    assert all(a < z for a, z in cuts) and all(x[1] == y[0] for x, y in zip(cuts, cuts[1:], strict=False))
    places = {*chunk_starts(sizes), sum(sizes)}
    assert {a for a, _ in cuts} <= places
    share = sum(sizes) / shards
    # A cut lies no farther from its ideal place than half a chunk, or than what whole tensors are worth.
    assert max(z - a for a, z in cuts) <= share + 2 * max(CHUNK / 2, share / 8)
    # What falls into the shards is all there is, once.
    parts = [part_of_options({"sizes": sizes, "rules": []}, a, z)["sizes"] for a, z in cuts]
    assert [sum(p) for p in parts] == [z - a for a, z in cuts]
    assert sorted(a + c for (a, _), p in zip(cuts, parts, strict=True) for c in chunk_starts(p)) == chunk_starts(sizes)


def test_whole_tensors_are_kept_whole_where_that_is_fair() -> None:
    assert cut([100, 100, 98, 102], 2) == [(0, 200), (200, 400)]
    assert cut([100_000, 1_000, 101_000], 2) == [(0, 101_000), (101_000, 202_000)]
    # One large tensor is cut where a chunk of the norm begins.
    assert cut([10, 8 * CHUNK], 2) == [(0, 10 + 4 * CHUNK), (10 + 4 * CHUNK, 10 + 8 * CHUNK)]
    assert cut([3], 4) == [(0, 3)]


def values(version: int) -> list[np.ndarray]:
    rng = np.random.default_rng(version)
    return [(rng.normal(size=NUMEL) * np.logspace(-6, 6, NUMEL)).astype(np.float32) for _ in range(MICROBATCHES)]


def options(**changes: Any) -> dict[str, Any]:
    outer = OuterConfig(**{"lr": 0.05, "steps": 10, "schedule": "cosine", **changes}).model_dump()
    return {**outer, "sizes": SIZES, "rules": RULES}


class Sharded:
    """Several servers as the Ray backend drives them."""

    def __init__(self, snapshot: dict[str, Any], shards: int, **changes: Any) -> None:
        self.cuts = cut(SIZES, shards)
        whole = options(**changes)
        self.parts = [
            ParameterServer.at(part_of_snapshot(snapshot, a, z), part_of_options(whole, a, z)) for a, z in self.cuts
        ]

    def step(self, version: int) -> tuple[bytes, dict[str, float]]:
        for (a, z), part in zip(self.cuts, self.parts, strict=True):
            for m, value in enumerate(values(version)):
                part.add(version, MICROBATCHES, partial_sums(m, [value[a:z]], MICROBATCHES))
        norm = norm_of(s for part in self.parts for s in part.squares(version, TASKS))
        made = [part.commit(version, TASKS, norm) for part in self.parts]
        assert all(stats == made[0][1] for _, stats in made)
        return np.concatenate([w for w, _ in made]).tobytes(), made[0][1]


START = {"version": 0, "weights": np.linspace(-1, 1, NUMEL, dtype=np.float32), "outer_state": {}}


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1}], ids=["adam", "sgd"]
)
def test_any_number_of_shards_makes_the_bits_of_one(changes: dict[str, Any]) -> None:
    changes = {"clip_norm": 0.7, **changes}
    whole = ParameterServer(START["weights"], options(**changes))
    servers = [Sharded(START, n, **changes) for n in (1, 2, 3, 4)]
    assert [len(s.parts) for s in servers] == [1, 2, 3, 4]
    for version in range(3):
        whole.add(version, MICROBATCHES, partial_sums(0, values(version), MICROBATCHES))
        weights, stats = whole.commit(version, TASKS)
        assert stats["grad_norm"] > 0.7, "the clipping is to be seen to act"
        for s in servers:
            assert s.step(version) == (weights.tobytes(), stats)
        if version == 1:
            # Saved by one number of shards, continued by another.
            saved = [joined_snapshot([p.snapshot() for p in s.parts]) for s in servers]
            wanted = whole.snapshot()
            for snapshot in saved:
                assert snapshot["version"] == 2 and snapshot["outer_state"].keys() == wanted["outer_state"].keys()
                assert all(np.array_equal(v, wanted["outer_state"][k]) for k, v in snapshot["outer_state"].items())
            servers = [Sharded(saved[-i], n, **changes) for i, n in enumerate((4, 1, 3, 2), 1)]


def test_a_norm_that_is_not_finite_moves_no_shard() -> None:
    s = Sharded(START, 3)
    s.step(0)
    before = [p.weights().tobytes() for p in s.parts]
    bad = values(1)
    bad[2][7] = np.inf
    for (a, z), part in zip(s.cuts, s.parts, strict=True):
        part.add(1, MICROBATCHES, partial_sums(0, [v[a:z] for v in bad], MICROBATCHES))
    norm = norm_of(x for part in s.parts for x in part.squares(1, TASKS))
    for part in s.parts:
        with pytest.raises(FloatingPointError):
            part.commit(1, TASKS, norm)
    assert [p.weights().tobytes() for p in s.parts] == before
    # What was summed up is let go: the version can be made of other gradients.
    assert s.step(1)[1]["grad_norm"] > 0


def test_late_gradients_do_not_reach_what_was_summed_up() -> None:
    s = Sharded(START, 2)
    part, (a, z) = s.parts[0], s.cuts[0]
    part.add(0, MICROBATCHES, partial_sums(0, [v[a:z] for v in values(0)], MICROBATCHES))
    first = part.squares(0, TASKS)
    assert part.add(0, MICROBATCHES, partial_sums(0, [v[a:z] for v in values(5)], MICROBATCHES)) == 0
    assert part.squares(0, TASKS) == first
    with pytest.raises(ValueError, match="asked to sum up version 1, but the server holds 0"):
        part.squares(1, TASKS)


def test_shards_at_different_versions_make_no_snapshot() -> None:
    s = Sharded(START, 2)
    parts = [p.snapshot() for p in s.parts]
    parts[1]["version"] = 1
    with pytest.raises(ValueError, match=r"different versions: \[0, 1\]"):
        joined_snapshot(parts)
