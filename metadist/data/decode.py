"""Bytes of a shard to arrays, by formats that cannot run code and within caps on size."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from metadist.data.planes import empty_images
from metadist.errors import DataError

MAX_PIXELS = 1 << 26
MAX_JSON_BYTES = 1 << 26
MAX_BLOCK_BYTES = 1 << 31
IMAGE_FORMATS = ("PNG", "JPEG")
SOURCE_FORMATS = (*IMAGE_FORMATS, "WEBP", "BMP", "GIF", "TIFF")
_NPY_1 = b"\x93NUMPY\x01\x00"


def npy(data: bytes, where: str) -> NDArray[Any]:
    """An array of plain numbers from the bytes of an ``.npy`` file; it shares their memory and cannot be altered.

    Raises:
        DataError: if it is not one, or holds Python objects.
    """
    try:
        if data[:8] != _NPY_1:
            return np.asarray(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False))
        start = 10 + int.from_bytes(data[8:10], "little")
        shape, order, dtype = _npy_header(data[:start])
        if dtype.hasobject:
            raise ValueError("Object arrays cannot be loaded")
        return np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape, order=order)
    except Exception as e:  # NumPy's reader of headers raises ValueError, EOFError, tokenize.TokenError and more
        raise DataError(where, f"is not a plain .npy array ({e})", "pack the set again") from None


@lru_cache(maxsize=256)
def _npy_header(head: bytes) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype[Any]]:
    """Shape, order and type of elements. The blocks of a set have few headers, and NumPy compiles each it reads.

    Raises:
        ValueError: if it is none, or a dimension is negative.
    """
    file = io.BytesIO(head)
    np.lib.format.read_magic(file)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if any(d < 0 for d in shape):
        raise ValueError(f"shape {shape}")
    return shape, "F" if fortran else "C", dtype


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object from UTF-8 bytes.

    Raises:
        DataError: if it is not one, or is larger than 64 MiB.
    """
    if len(data) > MAX_JSON_BYTES:
        raise DataError(where, f"{len(data)} bytes of JSON, more than {MAX_JSON_BYTES}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise DataError(where, f"is not JSON ({e})") from None
    if not isinstance(value, dict):
        raise DataError(where, f"is a JSON {type(value).__name__}, not an object")
    return value


def image(data: bytes, where: str, *, mode: str | None = None, formats: Sequence[str] = IMAGE_FORMATS) -> Any:
    """A decoded ``PIL.Image.Image``.

    Args:
        data: bytes of the file.
        where: the file, for messages.
        mode: ``"L"``, ``"RGB"``, or as it is if none.
        formats: formats that are read; PIL knows some sixty others, which are none of ours.

    Raises:
        DataError: if it is cut, damaged, of another format, or has more than 64 Mi pixels, or 32 bits for each.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=tuple(formats)) as opened:
                # The header tells the size; it is checked before a pixel is decoded.
                if opened.width * opened.height > MAX_PIXELS:
                    raise DataError(where, f"image of {opened.width} x {opened.height}, more than {MAX_PIXELS} pixels")
                opened.load()
                return opened.copy() if mode is None or opened.mode == mode else _converted(opened, mode, where)
    except DataError:
        raise
    except Exception as e:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more for bad bytes
        cause = "unknown format" if type(e).__name__ == "UnidentifiedImageError" else str(e) or type(e).__name__
        raise DataError(where, f"cannot be read as an image ({cause})", "replace or remove the file") from None


def _converted(image: Any, mode: str, where: str) -> Any:
    """In 8 bits a channel. PIL itself cuts what has more off at 255, which leaves a white picture."""
    from PIL import Image

    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode in ("I", "F") and not deep:
        raise DataError(where, "has 32 bits a pixel", "save it with 8 or 16")
    if not deep:
        return image.convert(mode)
    eight = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    eight.info = image.info
    return eight.convert(mode)


def cut(data: bytes, offsets: Any, n: int, where: str) -> list[bytes]:
    """The ``n`` examples of a ``.x.bin`` payload.

    Args:
        data: the concatenated examples.
        offsets: ``n + 1`` ascending byte offsets from the json, 0 first and ``len(data)`` last.

    Raises:
        DataError: if the offsets do not cut ``data`` into ``n``.
    """
    good = (
        isinstance(offsets, list)
        and all(type(o) is int for o in offsets)
        and len(offsets) == n + 1
        and offsets[0] == 0
        and offsets[-1] == len(data)
        and all(a <= b for a, b in zip(offsets, offsets[1:], strict=False))
    )
    if not good:
        raise DataError(where, f"offsets do not cut {len(data)} bytes into {n} examples", "pack the set again")
    return [data[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]


def examples(encoding: str, parts: Sequence[bytes], shape: Sequence[int], where: str) -> NDArray[np.uint8]:
    """Images of a ``.x.bin`` block as one array, uint8 ``[n, *shape]``, colours plane by plane in memory."""
    if len(parts) * math.prod(shape) > MAX_BLOCK_BYTES:
        raise DataError(where, f"{len(parts)} images of {list(shape)} in one block, more than {MAX_BLOCK_BYTES} bytes")
    out = empty_images(len(parts), tuple(shape))
    mode = "L" if len(shape) == 2 else "RGB"
    for i, part in enumerate(parts):
        pixels = np.asarray(image(part, f"{where}[{i}]", mode=mode, formats=(encoding.upper(),)))
        if pixels.shape != tuple(shape):
            raise DataError(f"{where}[{i}]", f"image of shape {list(pixels.shape)}, but the set's is {list(shape)}")
        out[i] = pixels
    return out
