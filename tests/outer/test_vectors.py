"""Passes over vectors have the same bits whatever the tree, the length and the machine."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadist.outer import vectors as passes
from metadist.outer.gradient import Block, TreeSum
from metadist.outer.vectors import ADD, tree_sum

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
    made = tree_sum(program, values)
    assert made.dtype == dtype and made.tobytes() == by_two(program, values).tobytes()
    assert all(np.array_equal(a, b) for a, b in zip(values, before, strict=True)), "what is added is only read"


def test_without_a_compiler_the_plain_form_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    values = vectors(3, 100, np.float32)
    wanted = tree_sum([0, 1, ADD, 2, ADD], values).tobytes()
    monkeypatch.setattr(passes, "_SOURCE", Path("nowhere.cpp"))
    assert tree_sum([0, 1, ADD, 2, ADD], values).tobytes() == wanted


def test_views_that_skip_numbers_are_added_as_well() -> None:
    a, b = (v[::2] for v in vectors(2, 100, np.float32))
    assert np.array_equal(tree_sum([0, 1, ADD], [a, b]), a + b)


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
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([1.0, 3.0, 16.0, 0.1]),
)
def test_means_and_squares_have_one_meaning_with_and_without_a_compiler(
    sizes: list[int], dtype: type, tasks: float
) -> None:
    (vector,) = vectors(1, sum(sizes), dtype)
    bounds = np.cumsum([0, *sizes])
    compiled, plain = vector.copy(), vector.copy()
    squares = passes.mean_and_squares(compiled, tasks, bounds)
    assert squares == [passes._mean_plainly(plain[a:z], tasks) for a, z in pairwise(bounds)]
    assert compiled.tobytes() == plain.tobytes() == (vector / dtype(tasks)).tobytes()
    for square, a, z in zip(squares, bounds, bounds[1:], strict=False):
        assert square == pytest.approx(float(np.sum(np.square(compiled[a:z].astype(np.float64)))), rel=1e-12)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_square_of_what_is_not_finite_is_not_finite(bad: float) -> None:
    vector = np.ones(40, np.float32)
    vector[17] = bad
    assert not np.isfinite(passes._mean_plainly(vector.copy(), 2.0))
    assert [bool(np.isfinite(s)) for s in passes.mean_and_squares(vector, 2.0, np.array([0, 17, 18, 40]))] == [1, 0, 1]
