"""Texts as numbers: what a token is, where a text is cut, and that no vocabulary is needed."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadist.data.tokens import Tokens
from metadist.episode import PADDING
from metadist.errors import DataError


def number(word: str, numbers: int = 8192) -> int:
    return 1 + zlib.crc32(word.encode()) % (numbers - 1)


def test_words_are_numbered_by_their_hash_whatever_their_case() -> None:
    read = Tokens("words", 6)(["Play it, SAM", "play", "ça va?"])
    assert read.dtype == np.int64 and read.shape == (3, 6)
    assert read[0].tolist() == [*map(number, ["play", "it", ",", "sam"]), PADDING, PADDING]
    assert read[1].tolist() == [number("play")] + [PADDING] * 5
    assert read[2].tolist() == [*map(number, ["ça", "va", "?"])] + [PADDING] * 3


def test_a_word_comes_with_its_parts() -> None:
    (read,) = Tokens("subwords", 12)(["plays a"])
    wanted = ["plays", "<pl", "pla", "lay", "ays", "ys>", "a"]
    assert read.tolist()[:7] == [number(w) for w in wanted]
    shared = set(Tokens("subwords", 12)(["played"])[0]) & set(read[:6])
    assert {number(w) for w in ("<pl", "pla", "lay")} <= shared, "forms of a word share parts"


def test_bytes_are_those_of_utf_8() -> None:
    assert Tokens("bytes", 5)(["aé"])[0].tolist() == [1 + b for b in "aé".encode()] + [PADDING] * 2
    assert Tokens("bytes").vocabulary == 257 and Tokens("words", numbers=100).vocabulary == 100


@given(
    st.lists(st.text(), min_size=1, max_size=4), st.sampled_from(["words", "subwords", "bytes"]), st.integers(1, 9),
    st.integers(2, 300),
)  # fmt: skip
def test_any_text_has_tokens_within_the_vocabulary(texts: list[str], kind: str, length: int, numbers: int) -> None:
    tokens = Tokens(kind, length, numbers)  # type: ignore[arg-type]
    read = tokens(texts)
    assert read.shape == (len(texts), length) and read.min() >= 0 and read.max() < tokens.vocabulary
    longer = Tokens(kind, length + 3, numbers)(texts)  # type: ignore[arg-type]
    assert (longer[:, :length] == read).all(), "a text is cut at its end"
    padded = longer == PADDING
    assert (np.diff(padded.astype(int), axis=1) >= 0).all(), "padding is at the end alone"


@pytest.mark.parametrize(("options", "field"), [
    ({"kind": "letters"}, "tasks.tokens"), ({"length": 0}, "tasks.length"), ({"numbers": 1}, "tasks.vocabulary"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(options: dict, field: str) -> None:
    with pytest.raises(DataError, match=field):
        Tokens(**options)
