"""The embedded task set: tell apart letters of scripts never seen before. No download, no account.

Letters of many scripts, drawn from the fonts that matplotlib carries. Each face together with a small random
distortion stands for one of the "drawers" that Omniglot (Lake et al. 2015) has twenty of. Whole scripts are held out:

- train: Latin, Greek, Cyrillic, Arabic, Canadian Aboriginal syllabics, Lisu, Old Italic, Coptic and Ogham;
- validation: Georgian and N'Ko;
- test: Armenian, Hebrew, Tifinagh and Lao.

A letter whose printed picture nearly equals one kept before it is left out, in that order of splits, so that no
letter of the test is a letter of the training under another name (Latin O, Armenian Օ). So are ligatures, and what
has no picture in the reference face. Everything follows from the font files: the same bytes on every machine.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metadist.episode import Episode, EpisodeBatch, Examples
from metadist.errors import ConfigError
from metadist.files import write_atomically
from metadist.seeding import Rng
from metadist.tasks import rendering
from metadist.tasks.base import SPLITS, TaskSource
from metadist.tasks.sequences import arrange, check_choices

SCRIPTS = {
    "train": ("LATIN", "GREEK", "CYRILLIC", "ARABIC", "CANADIAN", "LISU", "OLD", "COPTIC", "OGHAM"),
    "validation": ("GEORGIAN", "NKO"),
    "test": ("ARMENIAN", "HEBREW", "TIFINAGH", "LAO"),
}
"""First words of the Unicode names of each split's letters."""

DRAWINGS = 20
"""Drawings of each letter."""

REFERENCE = "DejaVuSans.ttf"
FACES = (
    REFERENCE,
    "DejaVuSerif.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "DejaVuSans-Oblique.ttf",
    "STIXGeneral.ttf",
    "DejaVuSerif-Bold.ttf",
)
"""The drawers' faces. A letter's drawings go round those that have it."""

_FORMAT = 1  # raise when anything below changes the pictures
_NEAR = 0.10  # squared distance of two printed pictures, as a share of the ink of the lighter, that counts as equal
_DISTORTION = rendering.Distortion()
_DIGEST = 32


def _is_candidate(code: int, scripts: Sequence[str]) -> bool:
    letter = chr(code)
    if not unicodedata.category(letter).startswith("L") or unicodedata.category(letter) == "Lm":
        return False
    parts = unicodedata.normalize("NFKC", letter)
    return unicodedata.name(letter, "").split(" ")[0] in scripts and len(parts) == 1


def _near_duplicates(pictures: np.ndarray) -> np.ndarray:
    """Which pictures nearly equal a kept one before them, bool ``[n]``; uint8 ``[n, side, side]`` in."""
    n, side = len(pictures), pictures.shape[-1] // 2
    coarse = pictures[:, : 2 * side, : 2 * side].reshape(n, side, 2, side, 2).sum(axis=(2, 4), dtype=np.int64) >> 2
    # Sums of products of whole numbers below 2**53 are exact in float64, whatever order a BLAS adds them in.
    flat = coarse.reshape(n, -1).astype(np.float64)
    inner = flat @ flat.T
    ink = np.diagonal(inner)
    near = ink[:, None] + ink[None, :] - 2 * inner < _NEAR * np.minimum(ink[:, None], ink[None, :])
    dropped: np.ndarray = ink == 0
    for i in range(n):
        dropped[i] |= bool((near[i, :i] & ~dropped[:i]).any())
    return dropped


def _choose_letters(size: int) -> tuple[list[int], list[int]]:
    """The letters kept and the number of each one's split, in class order."""
    reference = rendering.font_folder() / REFERENCE
    known = sorted(rendering.letters_of(reference))
    pairs = [(code, s) for s, name in enumerate(SPLITS) for code in known if _is_candidate(code, SCRIPTS[name])]
    dropped = _near_duplicates(rendering.rasterise(reference, [code for code, _ in pairs], size))
    kept = [pair for pair, drop in zip(pairs, dropped, strict=True) if not drop]
    return [code for code, _ in kept], [split for _, split in kept]


def _draw(letters: Sequence[int], size: int) -> np.ndarray:
    """All drawings, uint8 ``[letters, DRAWINGS, size, size]``."""
    tiles: list[np.ndarray] = []
    of_letter: list[list[int]] = [[] for _ in letters]
    total = 0
    for face in FACES:
        font = rendering.font_folder() / face
        has = rendering.letters_of(font)
        mine = [i for i, code in enumerate(letters) if code in has]
        drawn = rendering.rasterise(font, [letters[i] for i in mine], size)
        for row, i in enumerate(mine):
            if drawn[row].any():
                of_letter[i].append(total + row)
        tiles.append(drawn)
        total += len(drawn)
    which = np.array([faces[d % len(faces)] for faces in of_letter for d in range(DRAWINGS)])
    # Keyed by the letter itself: its drawings do not depend on which others are kept.
    maps = [rendering.draw_maps(Rng(0, "glyphs", code), DRAWINGS, size, _DISTORTION) for code in letters]
    pictures = rendering.sample_tiles(np.concatenate(tiles), which, np.concatenate(maps), size)
    return pictures.reshape(len(letters), DRAWINGS, size, size)


def _build(size: int) -> np.ndarray:
    """Draws the whole set: a table of one row a letter, with fields ``letter``, ``split`` and ``drawings``."""
    letters, splits = _choose_letters(size)
    table = np.empty(len(letters), dtype=_row_type(size))
    table["letter"], table["split"], table["drawings"] = letters, splits, _draw(letters, size)
    return table


def _row_type(size: int) -> np.dtype[Any]:
    return np.dtype([("letter", "<u4"), ("split", "u1"), ("drawings", "u1", (DRAWINGS, size, size))])


def _cache_file(size: int) -> Path:
    """Where the set of this size is kept, named after everything that its bytes depend on."""
    import PIL
    from PIL import features

    made_of = (
        _FORMAT,
        size,
        DRAWINGS,
        _NEAR,
        _DISTORTION,
        SCRIPTS,
        rendering.font_bytes_id(rendering.font_folder() / face for face in FACES),
        PIL.__version__,
        features.version("freetype2"),
        unicodedata.unidata_version,
    )
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "metadist" / f"glyphs-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]}.npy"


def _read_cache(path: Path, size: int) -> tuple[np.ndarray, str] | None:
    """The table and its digest, or None unless the file is there and whole."""
    try:
        data = path.read_bytes()
        body, digest = data[:-_DIGEST], data[-_DIGEST:]
        if hashlib.sha256(body).digest() != digest:
            return None
        table = np.load(io.BytesIO(body), allow_pickle=False)
    except (OSError, ValueError):
        return None
    return (table, digest.hex()) if table.dtype == _row_type(size) else None


def _write_cache(path: Path, data: bytes) -> None:
    """Puts the file in place in one step; a cache that cannot be written is no reason to stop."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)


@functools.lru_cache(maxsize=2)
def _table(size: int) -> tuple[np.ndarray, str]:
    """The set and its content id, from the cache if it is there, drawn otherwise."""
    path = _cache_file(size)
    cached = _read_cache(path, size)
    if cached is None:
        buffer = io.BytesIO()
        table = _build(size)
        np.save(buffer, table, allow_pickle=False)
        body = buffer.getvalue()
        digest = hashlib.sha256(body).digest()
        _write_cache(path, body + digest)
        cached = table, digest.hex()
    cached[0].flags.writeable = False
    return cached


def glyph_images(size: int = 28) -> tuple[np.ndarray, list[str], dict[str, list[int]]]:
    """The whole embedded set.

    Args:
        size: pixels a side.

    Returns:
        Pictures, uint8 ``[classes, DRAWINGS, size, size]`` with ink 255, read-only; each class's Unicode name;
        and the numbers of each split's classes.
    """
    table, _ = _table(size)
    names = [unicodedata.name(chr(code)) for code in table["letter"]]
    return table["drawings"], names, {s: np.flatnonzero(table["split"] == i).tolist() for i, s in enumerate(SPLITS)}


class GlyphTasks(TaskSource):
    """Tell apart ``ways`` letters of one split, from ``shots`` drawings of each.

    Args:
        ways: letters a task, at least 2 and at most the split's.
        shots: support drawings of each letter, at least 1.
        query_shots: query drawings of each letter, at least 1; ``shots + query_shots <= 20``.
        split: ``train``, ``validation`` or ``test``; no script is in two of them.
        size: pixels a side of a picture, 12 to 112.
        order, labels: see :func:`~metadist.tasks.sequences.arrange`.

    An episode has ``support.x`` float32 ``[ways * shots, 1, size, size]`` in [0, 1], ink 1, and ``support.y`` int64
    ``[ways * shots]`` in ``[0, ways)``, class by class unless another order is asked for; the query likewise.
    ``info["classes"]`` names the letters.

    Raises:
        ConfigError: if a number is out of range.
    """

    def __init__(
        self,
        ways: int = 5,
        shots: int = 1,
        query_shots: int = 1,
        split: str = "train",
        size: int = 28,
        order: str = "by_class",
        labels: str = "index",
    ) -> None:
        check_choices(order, labels)
        for name, value, least in (("ways", ways, 2), ("shots", shots, 1), ("query_shots", query_shots, 1)):
            if value < least:
                raise ConfigError(f"tasks.{name}", f"is {value}", f"give at least {least}")
        if split not in SPLITS:
            raise ConfigError("tasks.split", f"is {split!r}", f"choose one of {', '.join(SPLITS)}")
        if not 12 <= size <= 112:
            raise ConfigError("tasks.size", f"is {size} pixels", "give 12 to 112")
        if shots + query_shots > DRAWINGS:
            raise ConfigError(
                "tasks.shots",
                f"shots + query_shots is {shots} + {query_shots} = {shots + query_shots}, "
                f"but a letter of glyphs has {DRAWINGS} drawings",
                f"make them add up to at most {DRAWINGS}",
            )
        self.ways, self.shots, self.query_shots, self.split_name, self.size = ways, shots, query_shots, split, size
        self.order, self.labels = order, labels
        classes = len(self._classes())
        if ways > classes:
            raise ConfigError(
                "tasks.ways",
                f"is {ways}, but the {split} split of glyphs has {classes} classes",
                f"give at most {classes}",
            )

    def split(self, name: str) -> GlyphTasks:
        """The source of the letters of ``name``, with the same ways and shots."""
        return GlyphTasks(self.ways, self.shots, self.query_shots, name, self.size, self.order, self.labels)

    def sample(self, rng: Rng) -> Episode:
        """Draws ``ways`` distinct letters, then ``shots + query_shots`` distinct drawings of each."""
        return self._batch([rng])[0]

    def episodes(self, seed: int, stream: str, numbers: Sequence[int]) -> EpisodeBatch:
        """The episodes of ``numbers``, stacked; see :meth:`TaskSource.episodes`."""
        return self._batch([Rng(seed, stream, number) for number in numbers])

    def describe(self) -> dict[str, Any]:
        """The set's digest, and how many classes and drawings the split has."""
        return {
            "content_id": _table(self.size)[1],
            "split": self.split_name,
            "ways": self.ways,
            "classes": len(self._classes()),
            "drawings": DRAWINGS,
        }

    def _classes(self) -> np.ndarray:
        """The split's rows of the table: a view, held here by no field, so that a pickled source stays small."""
        table, _ = _table(self.size)
        first, last = np.searchsorted(table["split"], SPLITS.index(self.split_name) + np.array([0, 1]))
        return table[first:last]

    def _batch(self, rngs: Sequence[Rng]) -> EpisodeBatch:
        if not rngs:
            raise ValueError("cannot stack zero episodes")
        rows, each = self._classes(), self.shots + self.query_shots
        letters = np.empty((len(rngs), self.ways), dtype=np.int64)
        order = np.empty((len(rngs), self.ways, DRAWINGS), dtype=np.uint64)
        for t, rng in enumerate(rngs):
            letters[t] = rng.choice(len(rows), self.ways)
            order[t] = rng.raw(self.ways * DRAWINGS).reshape(self.ways, DRAWINGS)
        # Sorting random words shuffles every letter's drawings at once.
        drawings = np.argsort(order, axis=-1, kind="stable")[:, :, :each]
        pictures = torch.from_numpy(rows["drawings"][letters[:, :, None], drawings])
        codes = rows["letter"][letters]
        info = tuple({"classes": [unicodedata.name(chr(code)) for code in chosen]} for chosen in codes)
        support, query = (self._examples(p) for p in pictures.split([self.shots, self.query_shots], 2))
        numbers = [(rng.seed, rng.stream, rng.index) for rng in rngs]
        return arrange(EpisodeBatch(support, query, info), numbers, self.order, self.labels)

    def _examples(self, pictures: torch.Tensor) -> Examples:
        """Pictures uint8 ``[T, ways, K, size, size]`` as inputs and labels, class by class."""
        tasks, ways, each = pictures.shape[:3]
        x = pictures.to(torch.float32).div_(255.0).reshape(tasks, ways * each, 1, self.size, self.size)
        return Examples(x, torch.arange(ways).repeat_interleave(each).expand(tasks, -1).contiguous())
