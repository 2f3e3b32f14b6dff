"""Small shard sets and made-up sources for the tests of this folder."""

from __future__ import annotations

import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from metadist.data import ShardSet
from metadist.seeding import Rng

SPLITS = {"train": list(range(7)), "validation": [7, 8], "test": [9, 10, 11]}


def images(classes: int = 12, examples: int = 6, size: int = 4, seed: int = 0) -> np.ndarray:
    """uint8 ``[classes, examples, size, size]``."""
    shape = (classes, examples, size, size)
    return Rng(seed, "images").integers(256, int(np.prod(shape))).astype(np.uint8).reshape(shape)


def shard_paths(path: Path) -> list[Path]:
    """The tars of a set, in order."""
    return sorted(path.glob("*.tar"))


def flip(path: Path, byte: int) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def payload_byte(path: Path) -> int:
    """A byte of block 2's pixels in the first shard."""
    return int(ShardSet(path).index["offset"][2]) + 130


def draw_omniglot(root: Path, characters: int = 8, zipped: bool = True) -> Path:
    """Eight made-up characters in the layout of Omniglot, half of them in each part."""
    noise = Rng(1, "ink").integers(2, characters * 20 * 105 * 105).astype(bool).reshape(characters, 20, 105, 105)
    for c in range(characters):
        part = "images_background" if c < characters // 2 else "images_evaluation"
        folder = root / part / f"Alpha{c % 2}" / f"character{c:02d}"
        folder.mkdir(parents=True)
        for d in range(20):
            Image.fromarray(noise[c, d]).save(folder / f"{c:04d}_{d + 1:02d}.png")
    if zipped:
        for part in ("images_background", "images_evaluation"):
            with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
                for file in sorted((root / part).rglob("*.png")):
                    archive.write(file, file.relative_to(root))
            shutil.rmtree(root / part)
    return root


def draw_folder(root: Path, classes: list[str], count: int = 3, colour: bool = True) -> Path:
    """``count`` pictures of 12 x 9 pixels for each class, of one colour each."""
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for j in range(count):
            value = (20 * i, 10 * j, 7) if colour else 20 * i + j
            Image.new("RGB" if colour else "L", (12, 9), value).save(root / name / f"{j}.png")
    return root


def bomb(path: Path) -> None:
    """A PNG whose header promises 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
