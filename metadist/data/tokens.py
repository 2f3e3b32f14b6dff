"""Sentences as whole numbers: bytes, or words told apart by a hash.

Neither keeps a vocabulary, so a run is used where its training data are not, and a word that training never met has a
number as any other.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from metadist.episode import PADDING
from metadist.errors import DataError

KINDS = ("words", "subwords", "bytes")
_WORD = re.compile(r"\w+|[^\w\s]")
_BYTES, _PART = 256, 3


@dataclass(frozen=True)
class Tokens:
    """How a text is read.

    Args:
        kind: ``words``: lower-cased words and single punctuation marks, each numbered by the CRC-32 of its UTF-8 modulo
            the numbers there are (the hashing trick, Weinberger et al. 2009); ``subwords``: each word, followed by its
            parts of three characters, its ends marked (Bojanowski et al. 2017), so that forms of a word that training
            never met are not strangers to each other; ``bytes``: those of its UTF-8.
        length: tokens of a text; a longer one is cut, a shorter one ends in :data:`~metadist.episode.PADDING`.
        numbers: of words, padding among them; two words share a number with probability one in so many.

    Raises:
        DataError: there is no such kind, or no room for a token.
    """

    kind: Literal["words", "subwords", "bytes"] = "words"
    length: int = 32
    numbers: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError("tasks.tokens", f"{self.kind!r} is none of {', '.join(KINDS)}")
        for name, value, least in (("length", self.length, 1), ("vocabulary", self.numbers, 2)):
            if value < least:
                raise DataError(f"tasks.{name}", f"{value} is too few", f"it must be at least {least}")

    @property
    def vocabulary(self) -> int:
        """Numbers a token may have, padding among them."""
        return 1 + _BYTES if self.kind == "bytes" else self.numbers

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Tokens of each text, int64 ``[n, length]`` in ``[0, vocabulary)``."""
        out = np.full((len(texts), self.length), PADDING, dtype=np.int64)
        for row, text in zip(out, texts, strict=True):
            read = self._read(text)[: self.length]
            row[: len(read)] = read
        return out

    def _read(self, text: str) -> list[int]:
        if self.kind == "bytes":
            return [1 + b for b in text.encode()[: self.length]]
        words = _WORD.findall(text.lower())[: self.length]
        if self.kind == "subwords":
            words = [part for word in words for part in (word, *_parts(word))]
        return [1 + zlib.crc32(word.encode()) % (self.numbers - 1) for word in words]


def _parts(word: str) -> list[str]:
    """Its runs of three characters, of the word between marks that no word holds: ``<pl pla lay ay>``."""
    marked = f"<{word}>"
    return [marked[i : i + _PART] for i in range(len(marked) - _PART + 1)] if len(marked) > _PART else []
