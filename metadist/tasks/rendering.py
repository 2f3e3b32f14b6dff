"""Letters as pictures: drawn from font files and distorted in whole numbers, so every machine gets the same bytes.

A letter is rasterised once a face into a *tile*, a square larger than the picture with the ink fitted into its
middle. A *drawing* samples a tile through a smooth random map: an affine one plus a coarse grid of displacements.
All arithmetic after the rasteriser is on integers (those in float32 stay below 2**24, where it is exact), since a
last bit that depends on the processor's vector width would give two workers different data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metadist.seeding import Rng

_BITS = 12  # tile coordinates are counted in 1/4096 of a pixel
_GRID = 4  # displacements are given on a grid of 4 by 4 points over the picture
_WEIGHT = 64  # and interpolated with weights counted in 1/64
_CHUNK = 512  # drawings sampled at a time, so that the work stays in the processor's cache


@dataclass(frozen=True)
class Distortion:
    """How far one drawing may differ from the printed letter; each number bounds a uniform draw.

    Args:
        rotation: degrees either way.
        shear: horizontal shift per unit of height, either way.
        scale: natural logarithm of each axis's scale, either way.
        shift: pixels of a 28-pixel picture, either way.
        wobble: pixels of a 28-pixel picture by which each grid point of the warp moves, either way.
    """

    rotation: float = 15.0
    shear: float = 0.25
    scale: float = 0.15
    shift: float = 2.0
    wobble: float = 1.5


def tile_side(size: int) -> int:
    """Pixels a side of the tile that pictures of ``size`` pixels are sampled from."""
    return size + 2 * math.ceil(size / 5)


def font_folder() -> Path:
    """The folder of font files that matplotlib carries."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def letters_of(font: Path) -> frozenset[int]:
    """The code points that a font file has a picture for."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(font)).get_charmap())


def rasterise(font: Path, letters: Sequence[int], size: int) -> np.ndarray:
    """Draws letters of one face, each fitted into the middle of its tile with its proportions kept.

    Args:
        font: the font file.
        letters: code points that the font has.
        size: pixels a side of the pictures to come; the ink's longer side becomes 6/7 of it.

    Returns:
        uint8 ``[letters, tile, tile]``, ink 255; all zero where a letter has no ink.
    """
    from PIL import Image, ImageFont

    side, box = tile_side(size), round(size * 6 / 7)
    face = ImageFont.truetype(str(font), 2 * size, layout_engine=ImageFont.Layout.BASIC)
    tiles = np.zeros((len(letters), side, side), dtype=np.uint8)
    for tile, letter in zip(tiles, letters, strict=True):
        mask = face.getmask(chr(letter), mode="L")
        width, height = mask.size
        ink = mask.getbbox() if width and height else None
        if ink is None:
            continue
        picture = Image.frombytes("L", mask.size, bytes(mask)).crop(ink)
        longest = max(picture.size)
        wide, high = (max(1, round(n * box / longest)) for n in picture.size)
        left, top = (side - wide) // 2, (side - high) // 2
        tile[top : top + high, left : left + wide] = np.asarray(picture.resize((wide, high), Image.Resampling.BILINEAR))
    return tiles


def _basis(size: int) -> np.ndarray:
    """What sampling coordinates are combined from, float32 ``[3 + 16, size * size]``, whole numbers.

    Rows: x and y from the centre in half pixels, 1, and the weights of the 16 grid points.
    """
    centred = 2 * np.arange(size) - (size - 1)
    y, x = np.meshgrid(centred, centred, indexing="ij")
    along = np.arange(size) * (_GRID - 1) / (size - 1)
    hat = np.rint(np.maximum(0.0, 1.0 - np.abs(along[None, :] - np.arange(_GRID)[:, None])) * 8)  # [4, size], in 1/8
    weights = (hat[:, None, :, None] * hat[None, :, None, :]).reshape(_GRID * _GRID, -1)  # in 1/64
    return np.concatenate([x.reshape(1, -1), y.reshape(1, -1), np.ones((1, size * size)), weights]).astype(np.float32)


def draw_maps(rng: Rng, count: int, size: int, amount: Distortion) -> np.ndarray:
    """Random maps from picture to tile coordinates, float32 ``[count, 2, 3 + 16]`` of whole numbers.

    The two rows give x and y of the tile, as coefficients of the sampling basis.
    """
    unit = rng.uniform(-1.0, 1.0, (count, 6 + 2 * _GRID * _GRID))
    turn, shear = np.radians(amount.rotation) * unit[:, 0], amount.shear * unit[:, 1]
    # The letter fills 6/7 of the picture before scaling; 1.05 leaves room for its turning.
    wide, high = (1.05 * np.exp(amount.scale * unit[:, i]) for i in (2, 3))
    cos, sin = np.cos(turn), np.sin(turn)
    across = np.stack([cos * wide, (shear * cos - sin) * high], axis=1)
    down = np.stack([sin * wide, (shear * sin + cos) * high], axis=1)
    pixel = size / 28 * (1 << _BITS)
    centre = (tile_side(size) - 1) / 2 * (1 << _BITS)
    maps = np.empty((count, 2, 3 + _GRID * _GRID), dtype=np.float64)
    maps[:, :, :2] = np.stack([across, down], axis=1) * (1 << _BITS) / 2
    maps[:, :, 2] = centre + amount.shift * pixel * unit[:, 4:6]
    maps[:, :, 3:] = amount.wobble * pixel / _WEIGHT * unit[:, 6:].reshape(count, 2, -1)
    return np.rint(maps).astype(np.float32)


def sample_tiles(tiles: np.ndarray, which: np.ndarray, maps: np.ndarray, size: int) -> np.ndarray:
    """Samples one picture for each map, bilinearly, in integers.

    Args:
        tiles: uint8 ``[tiles, side, side]`` with an empty border, as :func:`rasterise` gives them.
        which: the tile of each picture, int64 ``[pictures]``.
        maps: as :func:`draw_maps` gives them, float32 ``[pictures, 2, 19]``.
        size: pixels a side of the pictures.

    Returns:
        uint8 ``[pictures, size, size]``.
    """
    basis, out = _basis(size), np.empty((len(which), size * size), dtype=np.uint8)
    for start in range(0, len(which), _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part] = _sample_chunk(tiles, which[part], maps[part], basis)
    return out.reshape(-1, size, size)


def _sample_chunk(tiles: np.ndarray, which: np.ndarray, maps: np.ndarray, basis: np.ndarray) -> np.ndarray:
    side = tiles.shape[-1]
    points = (maps.reshape(-1, maps.shape[-1]) @ basis).astype(np.int32).reshape(len(which), 2, -1)
    # Past the border there is nothing to see: the tile's edge is empty, so clipping reads zeros.
    np.clip(points, 0, ((side - 1) << _BITS) - 1, out=points)
    cell, fraction = points >> _BITS, (points >> (_BITS - 8)) & 255
    at = cell[:, 1] * side + cell[:, 0] + (which * side * side).astype(np.int32)[:, None]
    right, down, flat = fraction[:, 0], fraction[:, 1], tiles.reshape(-1)

    def row(first: np.ndarray) -> np.ndarray:
        left_ink = flat.take(first).astype(np.int32)
        blended: np.ndarray = (left_ink << 8) + (flat.take(first + 1).astype(np.int32) - left_ink) * right
        return blended

    above = row(at)
    blend: np.ndarray = (above << 8) + (row(at + side) - above) * down + (1 << 15)
    picture: np.ndarray = blend >> 16
    return picture


def font_bytes_id(fonts: Iterable[Path]) -> str:
    """A digest of font files' names and bytes."""
    digest = hashlib.sha256()
    for font in fonts:
        data = font.read_bytes()
        digest.update(f"{font.name} {len(data)} ".encode() + data)
    return digest.hexdigest()
