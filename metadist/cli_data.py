"""``metadist data``: checking and describing shard sets; :mod:`metadist.cli_pack` packs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from metadist.cli_pack import pack
from metadist.progress import Progress

_LONGEST = 80


@click.group()
def data() -> None:
    """Pack, check and describe shard sets.

    \b
    Example:
      metadist data pack glyphs --out data/glyphs
    """


data.add_command(pack)


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
@click.option("--html", type=click.Path(path_type=Path), help="Write a page: counts, classes, episodes as drawn.")
def info(directory: Path, as_json: bool, html: Path | None) -> None:
    """Say what a shard set holds.

    \b
    Example:
      metadist data info data/omniglot
      metadist data info data/omniglot --html omniglot.html
    """
    from metadist.data import info as describe

    if html is not None:
        from metadist.data_page import write_data_page

        write_data_page(directory, html)
    held = describe(directory)
    if as_json:
        click.echo(json.dumps(held))
        return
    for name, value in held.items():
        shown = ", ".join(f"{k}: {_in_short(v)}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name:<12} {shown}")
    if html is not None:
        click.echo(f"{'page':<12} {html}")


def _in_short(value: Any) -> Any:
    """A note of the manifest for one line: how much there is of what is long; ``--json`` has it all."""
    return value if not isinstance(value, (dict, list)) or len(str(value)) <= _LONGEST else f"{len(value):,} entries"
