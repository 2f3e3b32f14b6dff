"""``metadist adapt`` and ``metadist export``: using what a run has learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from metadist.cli_code import allowed, code_option

_RUN = click.argument("run_dir", type=click.Path(path_type=Path))
_SUPPORT = click.option(
    "--support", required=True, type=click.Path(path_type=Path),
    help="Folder or zip with a folder of pictures for each class; or a table with columns text and label.",
)  # fmt: skip
_CHECKPOINT = click.option("--checkpoint", default="latest", show_default=True, help="latest, best, or a version.")


@click.command()
@_RUN
@_SUPPORT
@click.option(
    "--query", required=True, type=click.Path(path_type=Path),
    help="Folder or zip of pictures, or one picture; in folders of the classes, accuracy is told. Or a table of texts.",
)  # fmt: skip
@_CHECKPOINT
@click.option("--out", type=click.Path(path_type=Path), help="Write the answers here too: a .csv or .json file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@code_option
def adapt(
    run_dir: Path, support: Path, query: Path, checkpoint: str, out: Path | None, as_json: bool, allow_code: bool
) -> None:
    """Adapt what a run has learned to a few examples of yours, and ask about others.

    The run's training data need not be there. Pictures are scaled and cropped to what the run learned from.

    \b
    Example:
      metadist adapt runs/omniglot --support mine/known --query mine/unknown --out answers.csv
    """
    from metadist import adapting

    adapted = adapting.adapt(run_dir, support, checkpoint, {"code": allowed(allow_code)})
    answers = adapting.predict(adapted, query)
    if out is not None:
        adapting.write(out, adapted, answers)
    if as_json:
        click.echo(json.dumps(adapting.as_json(adapted, answers)))
        return
    click.echo(_table(adapted, answers))
    share = adapting.accuracy_of(answers)
    if share is not None:
        click.echo(f"{100 * share:.1f} % of {len(answers)} are right")
    if adapted.note:
        click.echo(f"note: {adapted.note}", err=True)


@click.command()
@_RUN
@_SUPPORT
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A .pt2 or .safetensors file.")
@click.option(
    "--format", "kind", type=click.Choice(["torch-export", "safetensors"]), default="torch-export", show_default=True,
    help="A program that runs with torch alone; or the adapted tensors by name.",
)  # fmt: skip
@_CHECKPOINT
@code_option
def export(run_dir: Path, support: Path, out: Path, kind: str, checkpoint: str, allow_code: bool) -> None:
    """Write a learner adapted to your examples, for where metadist is not.

    Of a .pt2 file, torch.export.load(FILE).module() gives the scores of each class for inputs [N, ...]. The names of
    the classes, and how pictures or texts become inputs, stand in a .json file beside it.

    \b
    Example:
      metadist export runs/omniglot --support mine/known --out mine.pt2
    """
    from metadist import adapting
    from metadist.exporting import FORMATS

    stand_ins = {"code": allowed(allow_code)}
    adapted = adapting.adapt(run_dir, support, checkpoint, stand_ins, plain=True)
    FORMATS[kind](adapted, out)
    shots = ", ".join(f"{name} ({count})" for name, count in adapted.shots.items())
    click.echo(f"{out}: {len(adapted.classes)} classes, {shots}; described in {out.with_suffix('.json')}")
    if adapted.note:
        click.echo(f"note: {adapted.note}", err=True)


def _table(adapted: Any, answers: Any) -> str:
    from metadist.tracking.console import table

    few = len(adapted.classes) <= 10
    columns = ["", "class", *(adapted.classes if few else ["probability"])]
    rows = []
    for p in answers:
        shown = p.probabilities.values() if few else [p.probabilities[p.klass]]
        rows.append([p.name, p.klass, *(f"{100 * v:.1f} %" for v in shown)])
    return table(columns, rows)
