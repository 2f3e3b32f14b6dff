"""Packing pictures that lie in one ``.npz`` file: ``x``, and the label of each in ``y``."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metadist.data import decode
from metadist.data.manifest import Field, Manifest
from metadist.data.pack import BLOCK_EXAMPLES, pack_classes
from metadist.data.samplers import Ints
from metadist.data.sources import Progress
from metadist.data.splits import Membership, StrPath, choose, numbered
from metadist.data.tolerance import large_enough, short
from metadist.data.writer import SHARD_BYTES, refuse_existing
from metadist.errors import DataError, first_line

_SAVE = "save it with np.savez(FILE, x=pictures, y=labels)"
_MOST_CHANNELS = 32


def pack_npz(
    source: StrPath,
    out: StrPath,
    *,
    splits: StrPath | None = None,
    seed: int = 0,
    least: int = 2,
    on_bad: str = "error",
    name: str | None = None,
    licence: str = "",
    block_examples: int = BLOCK_EXAMPLES,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Manifest:
    """Packs the pictures of an ``.npz`` file; nothing of it is unpickled.

    Args:
        source: the file. ``x``: pictures ``[N, H, W]`` or ``[N, H, W, C]``, uint8, bool, or floats of 0 to 1, which
            become uint8. ``y``: labels ``[N]``, whole numbers or texts. ``split``, if it is there: split of each
            picture's class, texts ``[N]``. ``names``, if it is there: names of the classes whose numbers are in ``y``.
        out: directory to make; it must not exist.
        splits: JSON file of lists of classes, ``{"train": [...], ...}``, in place of ``split``.
        seed: of the deal, where there is neither.
        least: examples that a class must have.
        on_bad: what a class of fewer means: ``error``, or ``skip``: it is left out.
        name, licence, block_examples, shard_bytes, progress: as for :func:`~metadist.data.pack.pack_classes`.

    Raises:
        DataError: as :func:`~metadist.data.pack.pack_classes`, or if the file is not one, lacks an array, or its
            arrays do not fit each other.
    """
    if on_bad not in ("error", "skip"):
        raise DataError("on_bad", f"{on_bad!r}", "write error or skip")
    path = Path(source)
    refuse_existing(Path(out))
    arrays = _read(path, wanted=("x", "y"), others=("split", "names"))
    x, was = _pictures(f"{path}: x", arrays["x"])
    labels = _labels(path, arrays["y"], len(x), arrays.get("names"))
    rows = _rows_by_class(labels)
    told = _told_splits(path, labels, arrays["split"]) if "split" in arrays and splits is None else None
    counts = {name: len(found) for name, found in rows.items()}
    small = large_enough(counts, least, on_bad == "skip", path)
    large = [name for name in rows if name not in small]
    chosen = choose(large, told=told, listed=splits, seed=seed)
    members = {name for names in chosen.values() for name in names}
    names = [name for name in large if name in members]
    notes = {"converted": was, "too_small": small, "in_no_split": len(large) - len(names)}
    return pack_classes(
        out,
        [(name, lambda name=name: _as_bytes(x[rows[name]])) for name in names],  # type: ignore[misc]
        numbered(chosen, names),
        Field("array", x.shape[1:]),
        name=name or path.stem,
        licence=licence,
        source=path.name,
        notes={key: value for key, value in notes.items() if value},
        block_examples=block_examples,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def _read(path: Path, wanted: Sequence[str], others: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Those arrays of the file, without pickle."""
    try:
        archive = zipfile.ZipFile(path)
    except OSError as e:
        raise DataError(path, f"cannot be read ({e.strerror or e})", "give an .npz file") from None
    except Exception as e:  # BadZipFile, NotImplementedError, UnicodeDecodeError and more
        raise DataError(path, f"is not an .npz file, or is cut ({first_line(e)})", _SAVE) from None
    with archive:
        held = [entry.removesuffix(".npy") for entry in archive.namelist()]
        for key in wanted:
            if key not in held:
                has = ", ".join(map(short, held)) or "nothing"
                raise DataError(path, f"has no array {key!r}; it has {has}", _SAVE)
        return {key: _array(archive, key, path) for key in (*wanted, *others) if key in held}


def _array(archive: zipfile.ZipFile, key: str, path: Path) -> NDArray[Any]:
    where = f"{path}: {key}"
    try:
        with archive.open(f"{key}.npy") as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except ValueError as e:
        if "pickle" in str(e) or "Object arrays" in str(e):
            mend = f"save it as plain numbers or texts, {key}=np.array({key}.tolist())"
            raise DataError(where, "holds Python objects, which could run code when they are read", mend) from None
        raise DataError(where, f"is not a plain array ({first_line(e)})", _SAVE) from None
    except MemoryError:
        raise DataError(where, "is larger than memory", "pack a folder of pictures instead") from None
    except Exception as e:  # of the zip, its compression, the header: each has errors of its own
        raise DataError(where, f"is cut or damaged ({first_line(e)})", _SAVE) from None


def _pictures(where: str, x: NDArray[Any]) -> tuple[NDArray[Any], str]:
    """Pictures ``[N, H, W]`` or ``[N, H, W, C]`` that can become uint8, and what they are if they are not that."""
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise DataError(where, f"is {x.dtype} {list(x.shape)}", "it must be pictures [N, H, W] or [N, H, W, C]")
    if x.ndim == 4:
        channels_first = x.shape[1] in (1, 3) and x.shape[3] not in (1, 3)
        if channels_first or x.shape[3] > _MOST_CHANNELS:
            mend = "put the channels last, x.transpose(0, 2, 3, 1)"
            raise DataError(where, f"is {list(x.shape)}, {x.shape[3]} channels if they are last", mend)
        x = x[..., 0] if x.shape[3] == 1 else x
    if math.prod(x.shape[1:]) > decode.MAX_PIXELS * 4:
        raise DataError(where, f"pictures of {list(x.shape[1:])}", "make them smaller")
    if x.dtype == np.uint8:
        return x, ""
    if x.dtype == bool:
        return x, "bool to uint8, true is 255"
    if x.dtype.kind != "f":
        mend = "make it uint8 of 0 to 255, or float of 0 to 1"
        raise DataError(where, f"holds {x.dtype}", mend)
    for number, picture in enumerate(x):
        if not (picture.min() >= 0 and picture.max() <= 1):  # NaN is neither
            finite = np.isfinite(picture).all()
            found = f"holds {picture.min():g} to {picture.max():g}" if finite else "holds NaN or infinity"
            raise DataError(f"{where}[{number}]", found, "floats must be of 0 to 1; divide by 255 if they are bytes")
    return x, f"{x.dtype} of 0 to 1 to uint8"


def _as_bytes(x: NDArray[Any]) -> NDArray[np.uint8]:
    if x.dtype == np.uint8:
        return x
    return np.rint(x.astype(np.float32) * 255).astype(np.uint8)


def _labels(path: Path, y: NDArray[Any], n: int, names: NDArray[Any] | None) -> list[str]:
    """The class of each picture."""
    where = f"{path}: y"
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "iuUS":
        mend = "give one whole number or text for each picture" + (", y.argmax(1) of one-hot rows" * (y.ndim == 2))
        raise DataError(where, f"is {y.dtype} {list(y.shape)}", mend)
    if len(y) != n:
        raise DataError(where, f"{len(y)} labels for {n} pictures in x", "give one for each")
    if names is None:
        return _texts(where, y)
    if names.ndim != 1 or names.dtype.kind not in "US" or y.dtype.kind not in "iu":
        raise DataError(f"{path}: names", f"is {names.dtype} {list(names.shape)} for y of {y.dtype}",
                        "give the names as texts, and their numbers in y")  # fmt: skip
    if y.min() < 0 or y.max() >= len(names):
        found = f"holds {y.min()} to {y.max()}, but there are {len(names)} names"
        raise DataError(where, found, "number the names from 0")
    texts = _texts(f"{path}: names", names)
    if len(set(texts)) != len(texts):
        raise DataError(f"{path}: names", "a name is there twice", "give each class its own")
    return [texts[i] for i in y]


def _texts(where: str, values: NDArray[Any]) -> list[str]:
    if values.dtype.kind == "S":
        try:
            return [value.decode() for value in values.tolist()]
        except UnicodeDecodeError as e:
            raise DataError(where, f"is not UTF-8 ({e})", "save texts as np.array([...], dtype=str)") from None
    return [str(value) for value in values.tolist()]


def _rows_by_class(labels: Sequence[str]) -> dict[str, Ints]:
    """The rows of each class, classes in order: by number if all are numbers."""
    names, inverse = np.unique(np.array(labels), return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    edges = np.searchsorted(inverse[order], np.arange(len(names) + 1))
    rows = {str(name): order[a:z] for name, a, z in zip(names, edges[:-1], edges[1:], strict=True)}
    if all(name.lstrip("-").isdecimal() for name in rows):
        return {name: rows[name] for name in sorted(rows, key=int)}
    return rows


def _told_splits(path: Path, labels: Sequence[str], split: NDArray[Any]) -> dict[str, str]:
    where = f"{path}: split"
    if split.shape != (len(labels),) or split.dtype.kind not in "US":
        raise DataError(
            where, f"is {split.dtype} {list(split.shape)}", f"give a text for each of {len(labels)} pictures"
        )
    members = Membership("split")
    for row, (label, told) in enumerate(zip(labels, _texts(where, split), strict=True)):
        if not told or "+" in told:
            raise DataError(f"{where}[{row}]", f"{told!r} is no name of a split", "e.g. train, validation, test")
        members.add(label, told, f"{where}[{row}]")
    return members.of
