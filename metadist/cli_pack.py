"""``metadist data pack``: shard sets from what people have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from metadist.errors import DataError
from metadist.progress import Progress

_PATH = click.Path(path_type=Path)
_OUT = click.option("--out", required=True, type=_PATH, help="Directory to make; must not exist.")
_SEED = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of a random split.")
_SPLITS = click.option(
    "--splits", type=_PATH, help='JSON file of the classes of each split, {"train": [...], "validation": ...}.'
)
_ENCODING = click.option("--encoding", default="utf-8", show_default=True, help="Of the text, e.g. latin-1, utf-16.")
_DELIMITER = click.option("--delimiter", help="What cuts the values of a row.  [default: a comma, or a tab for .tsv]")
_HEADER = click.option("--header", help="Names of the columns, cut at commas, if the first line does not name them.")
_LEAST = click.option(
    "--least", type=click.IntRange(min=1), default=2, show_default=True, help="Examples that a class must have."
)
_ON_BAD = click.option(
    "--on-bad", type=click.Choice(["error", "skip"]), default="error", show_default=True,
    help="What one that cannot be read, or a class too small, means; skip leaves it out.",
)  # fmt: skip
_MOST_BAD = click.option(
    "--most-bad", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="With skip, the share that may be."
)

_NAMES = {False: ("class", "classes"), True: ("user", "users")}


@click.group()
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
    "--source", required=True, type=_PATH, help="One folder of pictures a class, or split/class/; or a zip of that."
)
@_OUT
@click.option("--size", type=click.IntRange(1, 4096), help="Side of the pictures in pixels.  [default: 84]")
@click.option("--as-is", is_flag=True, help="No scaling: all pictures are of one size.")
@click.option("--gray", "grayscale", is_flag=True, help="One channel instead of three.")
@click.option(
    "--labels", "tables", multiple=True, type=_PATH,
    help="Table of each picture's class, in place of folders; train.csv, val.csv and test.csv are splits.",
)  # fmt: skip
@click.option("--file-column", default="filename", show_default=True, help="In --labels: path, name or stem of a file.")
@click.option("--label-column", default="label", show_default=True, help="In --labels: its class.")
@click.option("--split-column", help="In --labels: the split of its class.")
@_SPLITS
@_SEED
@_LEAST
@_ON_BAD
@_MOST_BAD
def folder(
    source: Path, out: Path, size: int | None, as_is: bool, tables: tuple[Path, ...], file_column: str,
    label_column: str, split_column: str | None, **options: Any,
) -> None:  # fmt: skip
    """Pictures of your own, one folder a class: PNG, JPEG, WebP, BMP, GIF or TIFF.

    \b
    Example:
      metadist data pack folder --source pictures --out data/mine --size 84
      metadist data pack folder --source photos.zip --labels photos.csv --file-column id --out data/photos
    """
    from metadist.data import LabelTable, pack_folder

    if as_is and size is not None:
        raise click.UsageError("--as-is and --size contradict each other; give one of them")
    side = None if as_is else size or 84
    if tables:
        options["labels"] = LabelTable(tables, file_column, label_column, split_column)
    _packed(out, lambda progress: pack_folder(source, out, size=side, progress=progress, **options))


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


@pack.command()
@click.option(
    "--source", "sources", required=True, multiple=True, type=_PATH,
    help="CSV, TSV or JSON lines (.jsonl) with a row for each text; may be given several times.",
)  # fmt: skip
@_OUT
@click.option("--text-column", required=True, help="Name of the column of the texts.")
@click.option("--label-column", required=True, help="Name of the column of the labels: the classes.")
@click.option("--group-column", help="Of each class's group, which is in one split as a whole, e.g. a domain.")
@click.option("--split-column", help="Of each class's split; else classes are dealt at random.")
@_SPLITS
@_SEED
@_DELIMITER
@_HEADER
@_ENCODING
@_LEAST
@_ON_BAD
@_MOST_BAD
def csv(sources: tuple[Path, ...], out: Path, **options: Any) -> None:
    """A table of sentences and their labels.

    \b
    Example:
      metadist data pack csv --source tickets.csv --text-column message --label-column topic --out data/tickets
    """
    from metadist.data import pack_csv

    options |= _reading(options)
    _packed(out, lambda progress: pack_csv(sources, out, progress=progress, **options))


@pack.command()
@click.option("--source", type=_PATH, help="Folder with data_full.json and domains.json; else they are downloaded.")
@_OUT
@click.option("--splits", type=_PATH, help="JSON file of the domains of each split.  [default: 6, 2 and 2 of them]")
def clinc150(source: Path | None, out: Path, splits: Path | None) -> None:
    """What people ask an assistant: 150 intents of 10 domains (Larson et al. 2019).

    Whole domains are held out. What belongs to no intent is a class and a split of its own, oos.

    \b
    Example:
      metadist data pack clinc150 --out data/clinc150
    """
    from metadist.data import pack_clinc150

    _packed(out, lambda progress: pack_clinc150(source, out, splits=splits, progress=progress))


@pack.command()
@click.option(
    "--source", required=True, type=_PATH,
    help="CSV, TSV or JSON lines with a row for each rating, or MovieLens' folder.",
)  # fmt: skip
@_OUT
@click.option("--user-column", default="userId", show_default=True)
@click.option("--item-column", default="movieId", show_default=True)
@click.option("--rating-column", default="rating", show_default=True)
@click.option("--time-column", default="timestamp", show_default=True, help='Seconds or dates; "": order of the rows.')
@click.option("--items", type=_PATH, help="Table of the items' features.  [default: MovieLens' movies.csv]")
@click.option("--item-id-column", help="In --items.  [default: as --item-column]")
@click.option("--item-name-column", help="In --items: what an item is called.  [default: its id]")
@click.option("--features-column", "features_columns", multiple=True, help="In --items; may be given several times.")
@click.option("--features-separator", default="|", show_default=True, help="What parts features within a column.")
@click.option("--year-column", help="In --items: has a year in brackets, whose decade is a feature.")
@click.option("--users", type=_PATH, help="Table of the users' features.")
@click.option("--user-id-column", help="In --users.  [default: as --user-column]")
@click.option("--user-features-column", "user_columns", multiple=True, help="In --users; may be given several times.")
@click.option("--scale", type=float, nargs=2, help="Least and most rating there can be.  [default: those there are]")
@click.option(
    "--least", type=click.IntRange(min=2), default=20, show_default=True,
    help="Ratings that a user must have; others are left out.",
)  # fmt: skip
@_SEED
@_DELIMITER
@_HEADER
@_ENCODING
@_ON_BAD
@_MOST_BAD
def ratings(source: Path, out: Path, **given: Any) -> None:
    """A log of ratings: a class is a user, and a user's ratings are in the order of time.

    \b
    Example:
      metadist data pack ratings --source ml-latest-small --out data/movielens
      metadist data pack ratings --source stars.csv --user-column who --item-column book --rating-column stars \\
        --time-column day --items books.csv --features-column genre --out data/books
    """
    from metadist.data import Columns, FeatureTable, pack_ratings

    take, separator = given.pop, given.pop("features_separator")
    user, item, rating = (take(f"{part}_column") for part in ("user", "item", "rating"))
    columns = Columns(user, item, rating, take("time_column") or None)
    item_id, item_name, year = take("item_id_column") or item, take("item_name_column"), take("year_column")
    features, path = take("features_columns"), take("items")
    items = FeatureTable(path, item_id, features, separator, item_name, year) if path else None
    user_id, features, path = take("user_id_column") or user, take("user_columns"), take("users")
    users = FeatureTable(path, user_id, features, separator) if path else None
    given |= {"columns": columns, "items": items, "users": users, **_reading(given)}
    _packed(out, lambda progress: pack_ratings(source, out, progress=progress, **given))


@pack.command()
@click.option(
    "--source", required=True, type=_PATH, help="An .npz file with x and y; also split and names, if you like."
)
@_OUT
@_SPLITS
@_SEED
@_LEAST
@_ON_BAD
def arrays(source: Path, out: Path, **options: Any) -> None:
    """Pictures in one .npz file: x [N, H, W] or [N, H, W, C] of bytes, or floats of 0 to 1, and labels y [N].

    \b
    Example:
      python -c "import numpy as np; np.savez('mine.npz', x=pictures, y=labels)"
      metadist data pack arrays --source mine.npz --out data/mine
    """
    from metadist.data import pack_npz

    _packed(out, lambda progress: pack_npz(source, out, progress=progress, **options))


def _reading(options: Mapping[str, Any]) -> dict[str, Any]:
    """Delimiter and header as they are meant."""
    delimiter, header = options["delimiter"], options["header"]
    return {
        "delimiter": "\t" if delimiter in ("tab", "\\t") else delimiter,
        "header": [name.strip() for name in header.split(",")] if header else None,
    }


def _packed(out: Path, work: Callable[[Progress], Any]) -> None:
    with Progress("packing") as progress:
        manifest = work(progress)
    _done(out, manifest)


def _done(out: Path, manifest: Any) -> None:
    if manifest is None:
        raise DataError(out, "nothing was packed")
    for line in [*_left_out(manifest.notes), *_lonely(manifest)]:
        click.echo(line, err=True)
    names = _NAMES[manifest.notes.get("kind") == "ratings"]
    parts = ", ".join(f"{_many(len(members), *names)} {split}" for split, members in manifest.splits.items())
    click.echo(
        f"{out}: {parts}; {manifest.examples:,} examples in {len(manifest.shards)} shards, "
        f"content_id {manifest.content_id.removeprefix('sha256:')[:12]}"
    )


def _many(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


def _classes(count: int) -> str:
    return _many(count, "class", "classes")


def _lonely(manifest: Any) -> list[str]:
    """The usual splits that can make no episode by themselves, a line each."""
    users = manifest.notes.get("kind") == "ratings"
    return [
        f"no episode can be made of {split} alone, which has {_many(len(members), *_NAMES[users])}"
        for split, members in manifest.splits.items()
        if split in ("train", "validation", "test") and len(members) < (1 if users else 2)
    ]


def _left_out(notes: Mapping[str, Any]) -> list[str]:
    """What the user may want to know of a set that was packed, a line each."""
    from metadist.data.tolerance import named

    lines = [
        f"left out {count} of class {klass}, which cannot be read" for klass, count in notes.get("left_out", {}).items()
    ]
    if was := notes.get("converted"):
        lines.append(f"converted {was}")
    for file, count in notes.get("left_out_rows", {}).items():
        lines.append(f"left out {_many(count, 'row', 'rows')} of {file}, which cannot be read")
    if count := notes.get("few_ratings"):
        lines.append(f"left out {_many(count, 'user', 'users')} with too few ratings")
    if small := notes.get("too_small"):
        lines.append(f"left out {_classes(len(small))} with too few examples: {named(small)}")
    if count := notes.get("in_no_split"):
        lines.append(f"left out {_classes(count)} that no split names")
    if count := notes.get("repeated"):
        lines.append(
            f"{_many(count, 'text repeats', 'texts repeat')} another of its class: support and query may share it"
        )
    return lines
