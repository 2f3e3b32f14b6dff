"""The samplers: equal to their definition, word for word, and with the statistics that DESIGN promises."""

from __future__ import annotations

from collections import Counter, deque
from itertools import combinations, count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.data.samplers import ClassPool, UniformSampler, WindowSampler, choices, permutation, words_of
from metadist.errors import DataError
from metadist.seeding import Rng

UNIFORM = {"classes": [[4, 18, 20]], "rows": [[[29, 25], [110, 108], [120, 124]]]}
WINDOW = {"classes": [[11, 8, 13]], "rows": [[[71, 67], [52, 48], [82, 78]]]}


def pool(classes: int, blocks: int = 1, size: int = 6) -> ClassPool:
    """``classes`` upright classes of ``blocks`` blocks of ``size`` examples."""
    return ClassPool(
        names=[f"k{c}" for c in range(classes)],
        turns=np.zeros(classes, dtype=np.int64),
        first_block=np.arange(classes) * blocks,
        blocks=np.full(classes, blocks),
        block_rows=np.arange(classes * blocks + 1) * size,
    )


@given(seed=st.integers(0, 2**64 - 1), bounds=st.lists(st.integers(4, 30), min_size=1, max_size=5), k=st.integers(1, 4))
def test_choices_is_rng_choice_for_every_row(seed: int, bounds: list[int], k: int) -> None:
    words = np.stack([Rng(seed, "w", row).raw(k) for row in range(len(bounds))])
    wanted = [Rng(seed, "w", row).choice(n, k).tolist() for row, n in enumerate(bounds)]
    assert choices(words, np.array(bounds)).tolist() == wanted


@given(
    numbers=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3), min_size=1, max_size=6), words=st.integers(1, 9),
    seed=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_words_are_those_of_each_episodes_generator(numbers: list[int], words: int, seed: int) -> None:
    wanted = [Rng(seed, "w", number).raw(words).tolist() for number in numbers]
    assert words_of(seed, "w", numbers, words).tolist() == wanted


@pytest.mark.parametrize("numbers", [[0, -1], [2**64, 3]])
def test_an_episode_that_does_not_exist_has_no_words(numbers: list[int]) -> None:
    with pytest.raises(ValueError, match="index must be in"):
        words_of(0, "w", numbers, 4)


@given(n=st.integers(1, 60), seed=st.integers(0, 2**64 - 1))
def test_permutation_is_rng_permutation(n: int, seed: int) -> None:
    assert permutation(seed, "s/window", 3, n).tolist() == Rng(seed, "s/window", 3).permutation(n).tolist()


def test_uniform_follows_its_definition() -> None:
    sampler = UniformSampler(pool(30, blocks=2), ways=5, per_class=3, turn_each_task=True)
    draw = sampler.draw(9, "train", [4, 100_000])
    for row, e in enumerate([4, 100_000]):
        rng = Rng(9, "train", e)
        classes = rng.choice(30, 5)
        rows = [(12 * c + rng.choice(12, 3)).tolist() for c in classes]
        assert draw.classes[row].tolist() == classes.tolist()
        assert draw.rows[row].tolist() == rows
        assert draw.turns[row].tolist() == rng.integers(4, 5).tolist()


def test_known_answers() -> None:
    uniform = UniformSampler(pool(30), 3, 2).draw(7, "train", [3])
    assert uniform.classes.tolist() == UNIFORM["classes"] and uniform.rows.tolist() == UNIFORM["rows"]
    window = WindowSampler(pool(30), 3, 2, window=8, reuse=0.5).draw(7, "train", [100_000])
    assert window.classes.tolist() == WINDOW["classes"] and window.rows.tolist() == WINDOW["rows"]


def test_episode_100_000_of_the_window_by_seek_equals_replay() -> None:
    """The replay knows no arithmetic: it lets 50,006 slots go through a queue, one by one."""
    sampler = WindowSampler(pool(28), 3, 2, window=7, reuse=0.5)
    slots = (int(c) for p in count() for c in Rng(5, "train/window", p).permutation(28))
    held = deque((next(slots) for _ in range(7)), maxlen=7)
    for e in range(1, 100_001):
        if e % 2 == 0:
            held.append(next(slots))
    rng = Rng(5, "train", 100_000)
    newest = [c for i, c in enumerate(held) if c not in list(held)[i + 1 :]]
    classes = [newest[i] for i in rng.choice(len(newest), 3)]
    draw = sampler.draw(5, "train", [100_000])
    assert draw.classes[0].tolist() == classes
    assert draw.rows[0].tolist() == [(6 * c + rng.choice(6, 2)).tolist() for c in classes]


def test_a_batch_is_its_episodes_in_any_order() -> None:
    for sampler in (UniformSampler(pool(9), 3, 2), WindowSampler(pool(9), 3, 2, window=6, reuse=0.5)):
        batch = sampler.draw(1, "s", [5, 0, 17, 5])
        for row, e in enumerate([5, 0, 17, 5]):
            assert np.array_equal(batch.rows[row], sampler.draw(1, "s", [e]).rows[0])


@given(
    n=st.integers(3, 15), window=st.integers(5, 40), reuse=st.sampled_from([0.1, 0.25, 0.5, 1 / 3, 1.0, 1.5, 3.0]),
    blocks=st.integers(1, 3), number=st.integers(0, 10**9), seed=st.integers(0, 100),
)  # fmt: skip
@settings(max_examples=60)
def test_window_draws_distinct_classes_of_its_slots(
    n: int, window: int, reuse: float, blocks: int, number: int, seed: int
) -> None:
    sampler = WindowSampler(pool(n, blocks), 3, 4, window=window, reuse=reuse)
    draw = sampler.draw(seed, "s", [number])
    slots = sampler.start(number) + np.arange(window)
    classes, held = sampler.slots(seed, "s", slots)
    assert len(set(draw.classes[0].tolist())) == 3
    for c, rows in zip(draw.classes[0], draw.rows[0], strict=True):
        newest = held[np.flatnonzero(classes == c)[-1]]
        assert set((rows // 6).tolist()) == {int(newest)} and len(set(rows.tolist())) == 4


@pytest.mark.parametrize("reuse", [0.5, 1.0, 0.25, 2.0, 1 / 3])
def test_every_class_spends_w_over_r_episodes_in_the_window_each_pass(reuse: float) -> None:
    n, window = 12, 6
    sampler = WindowSampler(pool(n), 2, 2, window=window, reuse=reuse)
    spent: Counter[int] = Counter()
    for e in range(int(8 * n / reuse)):
        spent.update(range(sampler.start(e), sampler.start(e) + window))
    steady = [spent[slot] for slot in range(window, 7 * n)]
    assert set(steady) == {round(window / reuse)}
    slots = np.arange(7 * n)
    classes = sampler.slots(3, "s", slots)[0].reshape(7, n)
    assert all(sorted(p) == list(range(n)) for p in classes.tolist())  # each pass holds each class once
    assert len({tuple(p) for p in classes.tolist()}) == 7  # and no two passes in one order


def test_a_class_of_several_blocks_uses_them_in_turn() -> None:
    sampler = WindowSampler(pool(5, blocks=3), 2, 2, window=4, reuse=1.0)
    classes, blocks = sampler.slots(0, "s", np.arange(15))
    for c in range(5):
        assert sorted(blocks[classes == c].tolist()) == [3 * c, 3 * c + 1, 3 * c + 2]


def test_incoming_brings_every_slot_once_from_wherever_it_starts() -> None:
    sampler = WindowSampler(pool(9, blocks=2), 3, 2, window=6, reuse=0.5)
    for first in (0, 7, 1001):
        brought = sampler.incoming(0, "s", first, None)
        for e in range(first + 1, first + 20):
            brought += sampler.incoming(0, "s", e, e - 1)
        start = sampler.start(first)
        stop = sampler.start(first + 19) + 6
        assert brought == sampler.slots(0, "s", np.arange(start, stop))[1].tolist()


@pytest.mark.parametrize("stride", [1, 3, 40])
@pytest.mark.parametrize("last", [None, 4])
def test_arrivals_are_the_incoming_of_each_episode(stride: int, last: int | None) -> None:
    numbers = range(5, 5 + 30 * stride, stride)
    one = pool(9, blocks=2)
    for sampler in (UniformSampler(one, 3, 2), WindowSampler(one, 3, 2, window=6, reuse=0.5)):
        rows = sampler.draw(0, "s", numbers).rows
        before = [last, *numbers[:-1]]
        wanted = [sampler.incoming(0, "s", e, b) for e, b in zip(numbers, before, strict=True)]
        assert sampler.arrivals(0, "s", numbers, last, rows) == wanted


def test_windows_far_apart_are_drawn_without_what_lies_between() -> None:
    sampler = WindowSampler(pool(9), 3, 2, window=6, reuse=0.5)
    far = sampler.draw(0, "s", [3, 10**12])  # 10**11 passes over the classes lie between
    assert far.rows[1].tolist() == sampler.draw(0, "s", [10**12]).rows[0].tolist()


def pairs(sampler: UniformSampler | WindowSampler, episodes: int) -> set[tuple[int, ...]]:
    """Pairs of classes that meet in some episode."""
    drawn = sampler.draw(0, "pairs", range(episodes)).classes
    return {tuple(sorted(p)) for row in drawn.tolist() for p in combinations(row, 2)}


def test_window_meets_nearly_the_class_pairs_of_uniform() -> None:
    n, episodes = 120, 4000
    uniform = pairs(UniformSampler(pool(n), 5, 2), episodes)
    shares = [
        len(pairs(WindowSampler(pool(n), 5, 2, window=w, reuse=0.5), episodes)) / len(uniform) for w in (10, 30, 60)
    ]
    assert shares == sorted(shares)  # a wider window mixes better
    assert shares[1] > 0.85 and shares[2] > 0.95


def test_every_class_turns_up_equally() -> None:
    for sampler in (UniformSampler(pool(40), 5, 2), WindowSampler(pool(40), 5, 2, window=20, reuse=0.5)):
        counts = np.bincount(sampler.draw(2, "s", range(4000)).classes.ravel(), minlength=40)
        assert counts.min() > 420 and counts.max() < 580  # 500 each


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformSampler(pool(4), 5, 2), "tasks.ways: 5 ways, but the split has 4 classes"),
        (lambda: UniformSampler(pool(4), 0, 2), "tasks.ways: 0 is too few"),
        (lambda: UniformSampler(pool(4), 2, 7), "examples of each class, but the whole of class 'k0' holds 6"),
        (
            lambda: WindowSampler(pool(9, blocks=2), 2, 7, window=6, reuse=1),
            "tasks.shots + tasks.query_shots: 7 examples of each class, but a block of class 'k0' holds 6",
        ),
        (
            lambda: WindowSampler(pool(9), 5, 2, window=8, reuse=1),
            "tasks.sampler.blocks: a window of 8 blocks may hold only 4 distinct classes where two passes meet, "
            "but tasks.ways is 5; use at least 9 blocks",
        ),
        (lambda: WindowSampler(pool(9), 2, 2, window=8, reuse=0), "reuse above 0"),
        (lambda: WindowSampler(pool(9), 2, 2, window=8, reuse=1e-9), "tasks.sampler.reuse: 1e-09 is too small"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make: object, message: str) -> None:
    with pytest.raises(DataError) as error:
        make()  # type: ignore[operator]
    assert message in str(error.value)
