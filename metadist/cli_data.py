"""``metadist data``: packing, checking and describing shard sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from metadist.errors import DataError
from metadist.progress import Progress

_OUT = click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to make; must not exist.")


@click.group()
def data() -> None:
    """Pack, check and describe shard sets.

    \b
    Example:
      metadist data pack glyphs --out data/glyphs
    """


@data.group()
def pack() -> None:
    """Write a shard set.

    \b
    Example:
      metadist data pack omniglot --source downloads --out data/omniglot
    """


@pack.command()
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    help="Folder with the two upstream zips, or unpacked; else they are downloaded.",
)
@_OUT
@click.option("--split", type=click.Choice(["vinyals", "random"]), default="vinyals", show_default=True)
@click.option(
    "--splits-dir",
    type=click.Path(path_type=Path),
    help="Folder with vinyals_{train,val,test}.txt; else beside the source, or downloaded.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random split.")
@click.option(
    "--size", type=click.IntRange(1, 1024), default=28, show_default=True, help="Side of the pictures in pixels."
)
def omniglot(source: Path | None, out: Path, split: str, splits_dir: Path | None, seed: int, size: int) -> None:
    """Handwritten characters of 50 alphabets (Lake et al. 2015).

    \b
    Example:
      metadist data pack omniglot --source downloads --out data/omniglot --split vinyals --splits-dir splits
    """
    from metadist.data import pack_omniglot

    with Progress("packing") as progress:
        manifest = pack_omniglot(
            source, out, split=split, splits_dir=splits_dir, seed=seed, size=size, progress=progress
        )
    _done(out, manifest)


@pack.command()
@click.option(
    "--source", required=True, type=click.Path(path_type=Path), help="One folder of pictures a class, or split/class/."
)
@_OUT
@click.option(
    "--size", type=click.IntRange(1, 4096), default=84, show_default=True, help="Side of the pictures in pixels."
)
@click.option("--gray", is_flag=True, help="One channel instead of three.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random split of the classes."
)
@click.option(
    "--on-bad", type=click.Choice(["error", "skip"]), default="error", show_default=True,
    help="What a picture that cannot be read means; skip leaves it out.",
)  # fmt: skip
@click.option(
    "--most-bad", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="With skip, the share that may be."
)
def folder(source: Path, out: Path, size: int, gray: bool, seed: int, on_bad: str, most_bad: float) -> None:
    """Pictures of your own, one folder a class.

    \b
    Example:
      metadist data pack folder --source pictures --out data/mine --size 84
    """
    from metadist.data import pack_folder

    with Progress("packing") as progress:
        manifest = pack_folder(
            source, out, size=size, grayscale=gray, seed=seed, on_bad=on_bad, most_bad=most_bad, progress=progress
        )
    _done(out, manifest)


@pack.command()
@_OUT
def glyphs(out: Path) -> None:
    """Letters of many scripts from the fonts that matplotlib carries; no download.

    \b
    Example:
      metadist data pack glyphs --out data/glyphs
    """
    from metadist.data import pack_arrays
    from metadist.tasks.glyphs import glyph_images

    images, names, splits = glyph_images()
    with Progress("packing") as progress:
        manifest = pack_arrays(
            images, names, splits, out, name="glyphs", licence="Bitstream Vera / DejaVu and STIX font licences",
            source="letters drawn from the fonts that matplotlib carries", progress=progress,
        )  # fmt: skip
    _done(out, manifest)


@data.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(directory: Path, as_json: bool) -> None:
    """Read every byte of a shard set and check it.

    \b
    Example:
      metadist data verify data/omniglot
    """
    from dataclasses import asdict

    from metadist.data import verify as check

    with Progress("verifying") as progress:
        report = asdict(check(directory, progress=progress))
    if as_json:
        click.echo(json.dumps(report))
    else:
        click.echo(
            f"{directory}: whole. {report['shards']} shards, {report['blocks']} blocks, {report['examples']} examples, "
            f"{report['bytes']:,} bytes, content_id {report['content_id'].removeprefix('sha256:')[:12]}"
        )


@data.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(directory: Path, as_json: bool) -> None:
    """Say what a shard set holds.

    \b
    Example:
      metadist data info data/omniglot
    """
    from metadist.data import info as describe

    held = describe(directory)
    if as_json:
        click.echo(json.dumps(held))
        return
    for name, value in held.items():
        shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name:<12} {shown}")


def _done(out: Path, manifest: Any) -> None:
    if manifest is None:
        raise DataError(out, "nothing was packed")
    parts = ", ".join(f"{len(members)} classes {split}" for split, members in manifest.splits.items())
    for klass, count in manifest.notes.get("left_out", {}).items():
        click.echo(f"left out {count} of class {klass}, which cannot be read", err=True)
    click.echo(
        f"{out}: {parts}; {manifest.examples:,} examples in {len(manifest.shards)} shards, "
        f"content_id {manifest.content_id.removeprefix('sha256:')[:12]}"
    )
