"""Known answers of the random numbers: a run of one version must be a run of the next."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadist.seeding import Rng, stream_id

WORD = st.integers(0, 2**64 - 1)
PINNED: dict[str, Any] = {
    "stream": 13394367940604039246,
    "raw": [2653225405346873974, 4137942690058690119, 6960091935160414250],
    "integers": [4, 9, 0, 3, 5, 6, 1, 0],
    "choice": [14, 6, 10, 0, 11, 16],
    "permutation": [6, 0, 4, 1, 7, 2, 5, 3],
    "uniform": [0.14383163742854066, 0.22431832270910712],
    "normal": [-0.3997376277541761, -0.7126393445406796, 0.388312120367372],
    "torch_seed": 1326612702673436987,
}


def test_raw_words_are_philox_with_our_key_and_counter() -> None:
    rng = Rng(7, "train", 3)
    theirs = np.random.Philox(key=7 + (stream_id("train") << 64), counter=3 << 128)
    assert rng.raw(9).tolist() == theirs.random_raw(9).tolist()


def test_known_answers() -> None:
    assert stream_id("train") == PINNED["stream"]
    assert Rng(7, "train", 3).raw(3).tolist() == PINNED["raw"]
    assert Rng(7, "train", 3).integers(10, 8).tolist() == PINNED["integers"]
    assert Rng(7, "train", 3).choice(20, 6).tolist() == PINNED["choice"]
    assert Rng(7, "train", 3).permutation(8).tolist() == PINNED["permutation"]
    assert Rng(7, "train", 3).uniform(size=2).tolist() == pytest.approx(PINNED["uniform"], abs=0)
    assert Rng(7, "train", 3).normal(size=3).tolist() == pytest.approx(PINNED["normal"], rel=1e-14)
    assert Rng(7, "train", 3).torch_seed() == PINNED["torch_seed"]


def test_known_answer_of_philox4x64_from_its_authors() -> None:
    """Random123's kat_vectors, philox4x64-10 of key 0 and counter 0. NumPy steps its counter before it draws."""
    words = np.random.Philox(key=0, counter=2**256 - 1).random_raw(4)
    wanted = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert words.tolist() == wanted


@pytest.mark.parametrize("other", [Rng(8, "train", 3), Rng(7, "test", 3), Rng(7, "train", 4)])
def test_seed_stream_and_index_each_matter(other: Rng) -> None:
    assert not set(Rng(7, "train", 3).raw(64).tolist()) & set(other.raw(64).tolist())


def test_draws_do_not_depend_on_other_generators() -> None:
    a, b = Rng(1, "x", 5), Rng(1, "x", 6)
    mixed = [a.integer(1000), b.integer(1000), a.integer(1000), b.integer(1000)]
    again = Rng(1, "x", 5).integers(1000, 2).tolist()
    assert [mixed[0], mixed[2]] == again


def test_choice_is_uniform_over_ordered_pairs() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for e in range(6000):
        pair = tuple(Rng(3, "pairs", e).choice(5, 2).tolist())
        counts[pair] = counts.get(pair, 0) + 1
    assert len(counts) == 20
    chi2 = sum((n - 300) ** 2 / 300 for n in counts.values())
    assert chi2 < 43.8  # 99.9 % point of 19 degrees of freedom


@given(seed=WORD, index=WORD, n=st.integers(0, 40), data=st.data())
def test_choice_is_distinct_and_in_range(seed: int, index: int, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    chosen = Rng(seed, "any", index).choice(n, k).tolist()
    assert len(set(chosen)) == k and all(0 <= c < n for c in chosen)


def test_normal_has_mean_and_deviation() -> None:
    draws = Rng(5, "normal").normal(2.0, 3.0, size=100_000)
    assert abs(draws.mean() - 2) < 0.04 and abs(draws.std() - 3) < 0.03


@pytest.mark.parametrize(("kwargs", "message"), [({"seed": -1}, "seed"), ({"seed": 0, "index": 2**64}, "index")])
def test_out_of_range_is_refused(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message} must be in \[0, 2\*\*64\)"):
        Rng(**kwargs)  # type: ignore[arg-type]
