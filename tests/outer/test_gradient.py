"""Flat vectors and the sum whose bits nobody's timing can change."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.outer import Block, Layout, TreeSum, sha256_of
from metadist.outer.gradient import partial_sums, placed

MIXED = {
    "a": torch.tensor([[1.5, -2.0], [0.25, 3.0]], dtype=torch.float32),
    "b": torch.tensor(7.0 + 2**-40, dtype=torch.float64),
    "c": torch.tensor([0.5, -0.125], dtype=torch.bfloat16),
    "none": torch.empty(0, 3),
}


def vectors(count: int) -> list[np.ndarray]:
    """Numbers whose sum rounds differently in every order."""
    rng = np.random.default_rng(count)
    return [(rng.normal(size=5) * 10.0 ** rng.integers(-6, 6, 5)).astype(np.float32) for _ in range(count)]


def tree(values: list[np.ndarray]) -> np.ndarray:
    """The sum that TreeSum promises: left half of the next power of two, then the rest."""
    if len(values) == 1:
        return values[0]
    half = 1 << (len(values) - 1).bit_length() - 1
    return tree(values[:half]) + tree(values[half:])


# --------------------------------------------------------------------------- layout


def test_layout_round_trip_keeps_every_bit_of_mixed_dtypes() -> None:
    layout = Layout.of(MIXED)
    vector = layout.flatten(MIXED)
    assert (layout.numel, layout.dtype, tuple(vector.shape)) == (7, torch.float64, (7,))
    assert vector.tolist() == [1.5, -2.0, 0.25, 3.0, 7.0 + 2**-40, 0.5, -0.125]
    back = layout.unflatten(vector)
    assert list(back) == list(MIXED)
    for name, t in MIXED.items():
        assert back[name].dtype == t.dtype and torch.equal(back[name], t)


def test_layout_follows_its_own_order_of_names_and_copies() -> None:
    layout = Layout.of({"b": torch.zeros(1), "a": torch.zeros(2)})
    source = {"a": torch.tensor([2.0, 3.0]), "b": torch.tensor([1.0])}
    vector = layout.flatten(source)
    source["b"][0] = 9.0
    assert vector.tolist() == [1.0, 2.0, 3.0]


def test_half_precision_is_summed_in_single() -> None:
    assert Layout.of({"w": torch.zeros(2, dtype=torch.float16)}).dtype == torch.float32


def test_layout_refuses_what_cannot_be_learned_or_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"'steps' is torch.int64"):
        Layout.of({"steps": torch.tensor(3)})
    with pytest.raises(ValueError, match=r"\(6,\).*has 7"):
        Layout.of(MIXED).unflatten(torch.zeros(6))


# --------------------------------------------------------------------------- sum


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A count, and ranges that cover it in any order, overlapping and repeated."""
    count = draw(st.integers(1, 21))
    ranges = st.tuples(st.integers(0, count - 1), st.integers(1, count)).map(lambda r: (r[0], min(r[0] + r[1], count)))
    some = draw(st.lists(ranges, max_size=12))
    left = [m for m in range(count) if not any(a <= m < b for a, b in some)]
    return count, draw(st.permutations(some + [(m, m + 1) for m in left]))


@settings(deadline=None, max_examples=200)
@given(deliveries(), st.randoms(use_true_random=False))
def test_bits_do_not_depend_on_partition_order_or_repetition(case: tuple[int, list[tuple[int, int]]], random) -> None:
    count, ranges = case
    values, total = vectors(count), TreeSum(count)
    messages = [b for start, stop in ranges for b in partial_sums(start, values[start:stop], count).items()]
    random.shuffle(messages)
    for block, value in messages:
        total.add(block, value)
        assert total.add(block, value) is False, "a second delivery must be of no use"
    assert total.missing() == []
    assert total.total().tobytes() == tree(values).tobytes()


def test_the_tree_matters() -> None:
    """The bits of the test above would differ if the sum ran from left to right."""
    values = vectors(13)
    assert sum(values[1:], values[0]).tobytes() != tree(values).tobytes()


def test_missing_names_what_has_not_come() -> None:
    total = TreeSum(6)
    for m in (4, 1, 0):
        assert total.add(Block(0, m), np.ones(1)) is True
    assert total.missing() == [2, 3, 5]
    assert set(total.held()) == {Block(1, 0), Block(0, 4)}
    with pytest.raises(ValueError, match=r"lacks microbatches \[2, 3, 5\]"):
        total.total()


def test_a_larger_block_replaces_its_parts_once() -> None:
    total = TreeSum(4)
    total.add(Block(0, 1), np.array([1.0]))
    assert total.add(Block(1, 0), np.array([10.0])) is True
    assert total.add(Block(0, 0), np.array([100.0])) is False
    total.add(Block(1, 1), np.array([5.0]))
    assert total.total().tolist() == [15.0]


def test_inputs_are_not_modified() -> None:
    values = [np.full(3, float(m)) for m in range(5)]
    total = TreeSum(5)
    for m, value in enumerate(values):
        total.add(Block(0, m), value)
    assert total.total().tolist() == [10.0] * 3
    assert [v.tolist() for v in values] == [[float(m)] * 3 for m in range(5)]


@pytest.mark.parametrize("block", [Block(0, 5), Block(1, 3), Block(0, -1), Block(2, 2)])
def test_a_block_outside_the_sum_is_refused(block: Block) -> None:
    with pytest.raises(ValueError, match="beyond the 5 microbatches"):
        TreeSum(5).add(block, np.ones(1))


def test_an_empty_sum_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one vector, not 0"):
        TreeSum(0)


# --------------------------------------------------------------------------- checksum of meta-parameters


def test_sha256_is_over_names_dtypes_shapes_and_bytes_in_name_order() -> None:
    params = {"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([0.5], dtype=torch.float64)}
    spelled = b"b\0float64\0" + b"1\0" + np.float64([0.5]).tobytes() + b"w\0float32\0" + b"1,2\0"
    spelled += np.float32([1, 2]).tobytes()
    assert sha256_of(params) == hashlib.sha256(spelled).hexdigest()
    assert sha256_of(params) == PINNED
    assert sha256_of(dict(reversed(params.items()))) == PINNED
    assert sha256_of({**params, "w": torch.tensor([[1.0], [2.0]]).T}) == PINNED  # values, not memory order


PINNED = "f75ca6833749140effe9f3d9db8c261dd12071f008b2190eb34d6b28ee5d2a23"


@pytest.mark.parametrize(
    "other",
    [
        {"v": torch.tensor([1.0, 2.0])},
        {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        {"w": torch.tensor([[1.0, 2.0]])},
        {"w": torch.tensor([1.0, np.nextafter(np.float32(2), np.float32(3))])},
        {"w": torch.tensor([1.0, 2.0]), "x": torch.empty(0)},
    ],
    ids=["name", "dtype", "shape", "last bit", "an empty tensor more"],
)
def test_sha256_tells_apart(other: dict[str, torch.Tensor]) -> None:
    assert sha256_of(other) != sha256_of({"w": torch.tensor([1.0, 2.0])})


def test_sha256_tells_negative_zero() -> None:
    assert sha256_of({"w": torch.tensor([0.0])}) != sha256_of({"w": torch.tensor([-0.0])})


@given(st.integers(1, 12), st.data())
def test_a_sum_of_some_is_the_tree_without_the_others(count: int, data: st.DataObject) -> None:
    members = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    rng = np.random.default_rng(count)
    values = {m: (rng.normal(size=9) * 10.0 ** rng.integers(-6, 6, 9)).astype(np.float32) for m in range(count)}
    tree = TreeSum(count)
    runs = [sorted(members)] if data.draw(st.booleans()) else [[m] for m in sorted(members, reverse=True)]
    for run in runs:
        for m in run:
            tree.add(Block(0, m), values[m])

    def summed(level: int, index: int) -> np.ndarray | None:
        if level == 0:
            return values[index] if index in members else None
        left, right = summed(level - 1, 2 * index), summed(level - 1, 2 * index + 1)
        return left if right is None else right if left is None else left + right

    wanted = summed((count - 1).bit_length(), 0)
    assert wanted is not None and tree.total(sorted(members)).tobytes() == wanted.tobytes()


def test_a_sum_refuses_what_was_not_agreed_on() -> None:
    tree = TreeSum(4)
    for m in (0, 3):
        tree.add(Block(0, m), np.ones(2, np.float32))
    with pytest.raises(ValueError, match=r"lacks microbatches \[1\]"):
        tree.total([0, 1, 3])
    with pytest.raises(ValueError, match=r"holds microbatches \[3\] that"):
        tree.total([0])
    assert tree.total([0, 3]).tolist() == [2, 2]


def test_weights_and_places() -> None:
    one = {Block(0, 5): np.array([1, 3], np.float32)}
    assert {k: v.tolist() for k, v in placed(one, 2, 0.5).items()} == {Block(0, 2): [0.5, 1.5]}
    assert placed(one, None, 1.0)[Block(0, 5)] is one[Block(0, 5)]
    assert placed(one, 0, 1 / 3)[Block(0, 0)].dtype == np.float32
    with pytest.raises(ValueError, match="one microbatch"):
        placed({Block(1, 0): np.ones(2)}, 0, 1.0)


def test_what_is_discarded_is_missing_again_and_may_be_replaced() -> None:
    tree = TreeSum(4)
    for m in range(4):
        tree.add(Block(0, m), np.full(3, m, np.float32))
    tree.discard(Block(0, 2))
    tree.discard(Block(0, 2))
    assert tree.missing() == [2]
    tree.add(Block(0, 2), np.full(3, 20, np.float32))
    assert tree.total().tolist() == [24, 24, 24]
    assert list(tree.held()) == [Block(2, 0)]
    with pytest.raises(ValueError, match="part of a larger sum"):
        tree.discard(Block(0, 2))
