"""Passes over vectors have the same bits whatever the tree, the length and the machine."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metadist.inner.memory import peak_bytes
from metadist.outer import vectors as passes
from metadist.outer.gradient import Block, TreeSum
from metadist.outer.vectors import ADD, Addends, all_finite

TREES = st.recursive(st.just([0]), lambda t: st.tuples(t, t).map(lambda ab: [*ab[0], *ab[1], ADD]), max_leaves=40)


def vectors(count: int, n: int, dtype: type) -> list[np.ndarray]:
    rng = np.random.default_rng([count, n])
    return [(rng.normal(size=n) * 10.0 ** rng.uniform(-3, 3, n)).astype(dtype) for _ in range(count)]


def by_two(program: list[int], values: list[np.ndarray]) -> np.ndarray:
    stack: list[np.ndarray] = []
    for step in program:
        stack.append(stack.pop(-2) + stack.pop() if step == ADD else values[step])
    (total,) = stack
    return total


@given(TREES, st.sampled_from([0, 1, 17, 32_768, 70_001]), st.sampled_from([np.float32, np.float64, np.float16]))
def test_any_tree_is_added_two_by_two(program: list[int], n: int, dtype: type) -> None:
    leaves = iter(range(len(program)))
    program = [next(leaves) if step != ADD else ADD for step in program]
    values = vectors(program.count(ADD) + 1, n, dtype)
    before = [v.copy() for v in values]
    made = Addends(program, values).sum()
    assert made.dtype == dtype and made.tobytes() == by_two(program, values).tobytes()
    assert all(np.array_equal(a, b) for a, b in zip(values, before, strict=True)), "what is added is only read"


def test_without_a_compiler_the_plain_form_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    values = vectors(3, 100, np.float32)
    wanted = Addends([0, 1, ADD, 2, ADD], values).sum().tobytes()
    monkeypatch.setattr(passes, "_SOURCE", Path("nowhere.cpp"))
    assert Addends([0, 1, ADD, 2, ADD], values).sum().tobytes() == wanted


def test_views_that_skip_numbers_are_added_as_well() -> None:
    a, b = (v[::2] for v in vectors(2, 100, np.float32))
    assert np.array_equal(Addends([0, 1, ADD], [a, b]).sum(), a + b)


@given(st.integers(1, 40), st.sampled_from([0, 3 * 4 * 8, 1 << 31]), st.randoms(use_true_random=False))
def test_how_much_may_wait_changes_no_bit(count: int, hold: int, random) -> None:
    values = vectors(count, 8, np.float32)
    order = list(range(count))
    random.shuffle(order)
    held, at_once = TreeSum(count, hold), TreeSum(count, 0)
    for m in order:
        held.add(Block(0, m), values[m])
        waiting = sum(v.nbytes for v in held._held.values())
        assert waiting <= max(hold, 4 * 8 * (count.bit_length() + count))
    for m in range(count):
        at_once.add(Block(0, m), values[m])
        if hold == 0 and m:
            assert len(at_once._held) == bin(m + 1).count("1") or m + 1 == count, "whole nodes are added at once"
    assert held.total().tobytes() == at_once.total().tobytes()


@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=5),
    st.integers(1, 9),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([1.0, 3.0, 16.0, 0.1]),
)
def test_means_and_squares_have_one_meaning_with_and_without_a_compiler(
    sizes: list[int], count: int, dtype: type, tasks: float
) -> None:
    tree = TreeSum(count)
    for m, value in enumerate(vectors(count, sum(sizes), dtype)):
        tree.add(Block(0, m), value)
    addends, bounds = tree.addends(), np.cumsum([0, *sizes])
    before = [v.copy() for v in addends.values]
    with pytest.MonkeyPatch.context() as patch:
        mean, squares = addends.mean_and_squares(tasks, bounds)
        patch.setattr(passes, "_shared_out", lambda work, chunks, threads: genuine(work, chunks, 3))
        threads = addends.mean_and_squares(tasks, bounds)
        patch.setattr(passes, "function", lambda *what: None)
        plain = addends.mean_and_squares(tasks, bounds)
        wanted = (addends.sum() / dtype(tasks)).astype(dtype)
    assert mean.tobytes() == plain[0].tobytes() == threads[0].tobytes() == wanted.tobytes()
    assert squares.tobytes() == plain[1].tobytes() == threads[1].tobytes()
    for square, a, z in zip(squares, bounds, bounds[1:], strict=False):
        assert square == pytest.approx(float(np.sum(np.square(mean[a:z].astype(np.float64)))), rel=1e-12)
    assert all(np.array_equal(a, b) for a, b in zip(before, addends.values, strict=True)), "what is read was changed"


genuine = passes._shared_out


def test_chunks_longer_than_a_block_have_one_meaning_in_any_number_of_threads() -> None:
    size = 3 * 32768 + 17
    tree = TreeSum(5)
    for m, value in enumerate(vectors(5, size, np.float32)):
        tree.add(Block(0, m), value)
    bounds = np.array([0, 1, 40_000, size])
    mean, squares = tree.addends().mean_and_squares(7.0, bounds)
    assert mean.tobytes() == (tree.total() / np.float32(7)).tobytes()
    plain = [passes._mean_plainly(tree.total()[a:z].copy(), 7.0) for a, z in pairwise(bounds)]
    assert squares.tolist() == plain


@pytest.mark.parametrize("extra", [0, 1, 63, 1000])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_long_vectors_are_copied_whole_wherever_they_lie(dtype: type, shift: int, extra: int) -> None:
    size = passes._PAST_CACHE // np.dtype(dtype).itemsize + extra
    values = np.random.default_rng(size).integers(0, 60_000, size + shift).astype(dtype)[shift:]
    around = np.zeros(size + 200, dtype)
    begin = -around.ctypes.data % 64 // around.itemsize + shift
    passes.copy_into(around[begin : begin + size], values)
    assert np.array_equal(around[begin : begin + size], values)
    assert not around[:begin].any() and not around[begin + size :].any()


def test_long_means_have_the_bits_of_short_ones() -> None:
    size = 4_200_017  # past the cache
    tree = TreeSum(3)
    for m, value in enumerate(vectors(3, size, np.float32)):
        tree.add(Block(0, m), value)
    bounds = np.array([0, 1, 70_000, 3_000_003, size])
    mean, squares = tree.addends().mean_and_squares(3.0, bounds)
    assert mean.tobytes() == (tree.total() / np.float32(3)).tobytes()
    plain = [passes._mean_plainly(tree.total()[a:z].copy(), 3.0) for a, z in pairwise(bounds)]
    assert squares.tolist() == plain


def test_an_error_in_any_thread_is_raised() -> None:
    def work(first: int, last: int) -> None:
        if first:
            raise ValueError("part")

    with pytest.raises(ValueError, match="part"):
        passes._shared_out(work, 10, 3)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_square_of_what_is_not_finite_is_not_finite(bad: float) -> None:
    vector = np.ones(40, np.float32)
    vector[17] = bad
    assert not np.isfinite(passes._mean_plainly(vector.copy(), 2.0))
    _, squares = Addends([0], [vector]).mean_and_squares(2.0, np.array([0, 17, 18, 40]))
    assert np.isfinite(squares).tolist() == [True, False, True]


@given(
    st.integers(1, 70), st.sampled_from([np.inf, -np.inf, np.nan]), st.data(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_one_number_that_is_not_finite_is_found_wherever_it_is(n: int, bad: float, data, dtype: torch.dtype) -> None:
    values = torch.full((n,), torch.finfo(dtype).max, dtype=dtype)  # no sum of these is finite
    assert all_finite(values) and all_finite(-values) and all_finite(values[:0])
    values[data.draw(st.integers(0, n - 1))] = bad
    assert not all_finite(values) and not all_finite(values.reshape(n, 1))


def test_looking_for_what_is_not_finite_takes_no_memory() -> None:
    assert peak_bytes(lambda: all_finite(torch.ones(1).expand(1 << 20))) < 64
