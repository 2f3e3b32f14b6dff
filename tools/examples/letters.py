"""A folder of pictures to try the commands with, in place of one's own: letters, one folder each.

``FOLDER/pictures`` has classes to learn from, ``FOLDER/known`` a few pictures of five others, ``FOLDER/unknown`` more
of these.

Example: python tools/examples/letters.py mine
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from metadist.tasks.glyphs import glyph_images

NEW, KNOWN = 5, 2


def write(folder: Path, classes: int) -> None:
    """Writes the pictures of ``classes`` letters to learn from, and of five more."""
    images, _, splits = glyph_images()
    for number, letter in enumerate(splits["train"][:classes]):
        save(images[letter], folder / "pictures" / f"letter{number:03d}")
    for number, letter in enumerate(splits["test"][:NEW]):
        save(images[letter][:KNOWN], folder / "known" / f"new{number}")
        save(images[letter][KNOWN:], folder / "unknown" / f"new{number}")


def save(pictures: object, folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):  # type: ignore[arg-type, var-annotated]
        Image.fromarray(picture).save(folder / f"{number}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("folder", type=Path, help="made if it is not there")
    parser.add_argument("--classes", type=int, default=120, help="letters to learn from")
    options = parser.parse_args()
    write(options.folder, options.classes)
    print(f"{options.folder}: {options.classes} letters to learn from, {NEW} new ones")
