"""The parameter server: every message may come late or twice, and the version does not care."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from metadist.config.schema import OuterConfig
from metadist.outer import Block
from metadist.outer.gradient import partial_sums
from metadist.server import ParameterServer

START = np.linspace(-1, 1, 7, dtype=np.float32)
MICROBATCHES, TASKS = 5, 10


def server(views: bool = False, **changes: Any) -> ParameterServer:
    options = OuterConfig(**{"lr": 0.05, "steps": 10, **changes}).model_dump()
    return ParameterServer(START, options, views=views)


def values(version: int) -> list[np.ndarray]:
    rng = np.random.default_rng(version)
    return [rng.normal(size=7).astype(np.float32) for _ in range(MICROBATCHES)]


def step(server: ParameterServer, version: int) -> tuple[np.ndarray, dict[str, float]]:
    server.add(version, MICROBATCHES, partial_sums(0, values(version), MICROBATCHES))
    return server.commit(version, TASKS)


def test_a_step_moves_along_the_mean_over_tasks() -> None:
    weights, stats = step(server(optimizer="sgd"), 0)
    mean = np.sum(values(0), axis=0) / TASKS
    np.testing.assert_allclose(weights, START - 0.05 * mean, rtol=1e-6)
    assert stats["grad_norm"] == pytest.approx(float(np.linalg.norm(mean)), rel=1e-6)


def test_a_second_commit_of_a_version_answers_the_same_and_moves_nothing() -> None:
    s = server()
    first = step(s, 0)
    again = s.commit(0, TASKS)
    assert s.version == 1
    assert first[0].tobytes() == again[0].tobytes() and first[1] == again[1]


@pytest.mark.parametrize("version", [-2, 1, 5])
def test_a_commit_out_of_turn_is_refused(version: int) -> None:
    with pytest.raises(ValueError, match=f"asked to commit version {version}, but the server holds 0"):
        server().commit(version, TASKS)


def test_stale_and_early_gradients_are_dropped() -> None:
    s, plain = server(), server()
    step(s, 0)
    step(plain, 0)
    blocks = {Block(0, m): np.full(7, 100, np.float32) for m in range(MICROBATCHES)}
    assert s.add(0, MICROBATCHES, blocks) == 0
    assert s.add(2, MICROBATCHES, blocks) == 0
    assert step(s, 1)[0].tobytes() == step(plain, 1)[0].tobytes()


def test_repeated_and_overlapping_gradients_count_once() -> None:
    s, plain = server(), server()
    v = values(0)
    assert s.add(0, MICROBATCHES, partial_sums(1, v[1:3], MICROBATCHES)) == 2
    assert s.add(0, MICROBATCHES, partial_sums(1, v[1:3], MICROBATCHES)) == 0
    s.add(0, MICROBATCHES, partial_sums(0, v[:4], MICROBATCHES))
    s.add(0, MICROBATCHES, partial_sums(2, v[2:], MICROBATCHES))
    assert s.commit(0, TASKS)[0].tobytes() == step(plain, 0)[0].tobytes()


def test_a_commit_before_everything_has_come_is_refused_and_can_be_made_up_for() -> None:
    s, plain = server(), server()
    with pytest.raises(ValueError, match="no gradient of version 0"):
        s.commit(0, TASKS)
    v = values(0)
    s.add(0, MICROBATCHES, partial_sums(0, v[:3], MICROBATCHES))
    with pytest.raises(ValueError, match=r"lacks microbatches \[3, 4\]"):
        s.commit(0, TASKS)
    assert s.version == 0 and s.weights().tobytes() == START.tobytes()
    s.add(0, MICROBATCHES, partial_sums(3, v[3:], MICROBATCHES))
    assert s.commit(0, TASKS)[0].tobytes() == step(plain, 0)[0].tobytes()


def test_a_sum_that_is_not_finite_leaves_the_version_as_it_was() -> None:
    s, plain = server(), server()
    step(s, 0)
    step(plain, 0)
    bad = values(1)
    bad[2] = np.full(7, np.nan, np.float32)
    s.add(1, MICROBATCHES, partial_sums(0, bad, MICROBATCHES))
    with pytest.raises(FloatingPointError):
        s.commit(1, TASKS)
    assert s.version == 1 and s.weights().tobytes() == plain.weights().tobytes()
    assert step(s, 1)[0].tobytes() == step(plain, 1)[0].tobytes()


def test_a_snapshot_goes_on_bit_for_bit_in_a_new_server() -> None:
    whole, s = server(schedule="cosine"), server(schedule="cosine")
    for version in range(2):
        step(whole, version)
        step(s, version)
    snapshot = s.snapshot()
    step(s, 2)  # must not reach into the snapshot
    second = server(schedule="cosine")
    second.add(0, MICROBATCHES, partial_sums(0, values(9)[:2], MICROBATCHES))
    second.restore(snapshot)
    assert second.version == 2
    for version in (2, 3):
        assert step(second, version)[0].tobytes() == step(whole, version)[0].tobytes()
    assert second.snapshot()["outer_state"].keys() == whole.snapshot()["outer_state"].keys()


def test_weights_handed_out_and_in_are_copies() -> None:
    mine = START.copy()
    s = ParameterServer(mine, OuterConfig().model_dump())
    mine[:] = 0
    s.weights()[:] = 0
    assert s.weights().tobytes() == START.tobytes()


def test_views_are_of_what_it_holds() -> None:
    s = server(views=True)
    weights, _ = step(s, 0)
    snapshot = s.snapshot()
    assert np.shares_memory(weights, s.weights()) and np.shares_memory(weights, snapshot["weights"])
    assert np.shares_memory(snapshot["outer_state"]["exp_avg"], s.snapshot()["outer_state"]["exp_avg"])
    before = weights.copy()
    step(s, 1)
    assert not np.array_equal(before, weights), "the next update was not made in place"
    plain = server()
    step(plain, 0)
    step(plain, 1)
    assert weights.tobytes() == plain.weights().tobytes()


def test_a_retracted_gradient_leaves_its_place_to_another() -> None:
    s, plain = server(), server()
    v = values(0)
    s.retract(1)  # nothing has come yet
    for m in range(MICROBATCHES):
        s.add(0, MICROBATCHES, {Block(0, m): v[m] if m != 1 else v[m] * 100})
    s.retract(1)
    with pytest.raises(ValueError, match=r"lacks microbatches \[1\]"):
        s.commit(0, TASKS)
    assert s.add(0, MICROBATCHES, {Block(0, 1): v[1]}) == 1
    assert s.commit(0, TASKS)[0].tobytes() == step(plain, 0)[0].tobytes()


@pytest.mark.parametrize("whole", [True, False])
def test_what_was_handed_in_is_left_as_it_was(whole: bool) -> None:
    s, v = server(), values(0)
    blocks = partial_sums(0, v, MICROBATCHES) if whole else {Block(0, m): v[m] for m in range(MICROBATCHES)}
    before = {b: value.copy() for b, value in blocks.items()}
    s.add(0, MICROBATCHES, blocks)
    s.commit(0, TASKS)
    assert all(np.array_equal(blocks[b], before[b]) for b in blocks)
