"""The command line. A user's mistake is one line and exit code 2 or 1, never a traceback."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from metadist.cli_code import allowed, code_option
from metadist.cli_data import data
from metadist.cli_doctor import doctor
from metadist.cli_serve import serve
from metadist.cli_submit import submit
from metadist.cli_use import adapt, export
from metadist.errors import MetadistError


class _Group(click.Group):
    """Turns our errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MetadistError as e:
            click.echo(f"metadist: {e}", err=True)
            sys.exit(e.exit_code)
        except KeyboardInterrupt:
            click.echo("metadist: stopped", err=True)
            sys.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="metadist")
def main() -> None:
    """Learning to learn across many tasks, from a laptop to a GPU cluster.

    \b
    Example:
      metadist train configs/glyphs_maml.yaml
    """


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="Where the run is kept; must not exist.  [default: runs/NAME-TIME]",
)
@click.option(
    "--resume-if-exists", is_flag=True, help="Continue the run in --run-dir, or in checkpoint.path, if there is one."
)
@code_option
def train(
    config: Path, overrides: tuple[str, ...], run_dir: Path | None, resume_if_exists: bool, allow_code: bool
) -> None:
    """Meta-train what CONFIG says.

    \b
    Example:
      metadist train configs/sinusoid_maml.yaml outer.steps=2000 --run-dir runs/sines
    """
    from metadist.config import load_config
    from metadist.experiment import Experiment
    from metadist.training import resume as run_resume
    from metadist.training import train as run_train

    checked, code = load_config(config, overrides), allowed(allow_code, overrides)
    if resume_if_exists and run_dir is not None and (run_dir / "config.yaml").is_file():
        _stoppable(lambda: run_resume(run_dir, overrides, {"code": code}))
    else:
        _stoppable(lambda: run_train(Experiment(checked, code=code), run_dir, adopt=resume_if_exists))


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@code_option
def resume(run_dir: Path, overrides: tuple[str, ...], allow_code: bool) -> None:
    """Go on with a run from its newest whole checkpoint.

    \b
    Example:
      metadist resume runs/sines outer.steps=4000
    """
    from metadist.training import resume as run_resume

    _stoppable(lambda: run_resume(run_dir, overrides, {"code": allowed(allow_code, overrides)}))


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--episodes", type=click.IntRange(min=1), help="How many episodes.  [default: as in the config]")
@click.option("--checkpoint", default="latest", show_default=True, help="latest, best (in training), or a version.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--data", "sets", multiple=True, type=click.Path(path_type=Path), help="Another shard set; may be given again."
)
@click.option("--shots", multiple=True, type=click.IntRange(min=1), help="With --data; may be given again.")
@click.option("--ways", type=click.IntRange(min=2), help="With --data.  [default: as in the config]")
@click.option("--query-shots", type=click.IntRange(min=1), help="With --data.  [default: as in the config]")
@click.option("--split", default="test", show_default=True, help="With --data, of each set.")
@click.option(
    "--baselines", type=click.Choice(["all", "centroids", "none"]), default="all", show_default=True,
    help="With --data: what is judged beside the run. Fine-tuning takes long for networks of many parameters.",
)  # fmt: skip
@click.option("--picture", type=click.Path(path_type=Path), help="With --data: draw accuracy against shots here (PNG).")
@code_option
def evaluate(
    run_dir: Path,
    episodes: int | None,
    checkpoint: str,
    as_json: bool,
    sets: tuple[Path, ...],
    shots: tuple[int, ...],
    ways: int | None,
    query_shots: int | None,
    split: str,
    baselines: str,
    picture: Path | None,
    allow_code: bool,
) -> None:
    """Judge a run's checkpoint on held-out episodes, of its own data or of others.

    With --data pictures of another size or in colour are brought to what the run learned from, and the same episodes
    are given to nearest centroids and to fine-tuning as well: of the run's network, and of one before any training.

    \b
    Example:
      metadist evaluate runs/sines --episodes 1000 --json
      metadist evaluate runs/omniglot --data data/skin --data data/glyphs --shots 1 --shots 5 --picture crossing.png
    """
    if sets:
        from metadist.crossing import Crossing, crossed, table_of
        from metadist.figures import draw_by_shots
        from metadist.tracking.console import table

        stand_ins = {"code": allowed(allow_code)}
        asked = Crossing(sets, shots, ways, query_shots, split, episodes or 600, baselines, checkpoint, stand_ins)
        rows = crossed(run_dir, asked)
        if picture is not None:
            draw_by_shots(rows, picture)
        click.echo(json.dumps({"run_dir": str(run_dir), "rows": rows}) if as_json else table(*table_of(rows)))
        return
    for name, value in (("--shots", shots), ("--ways", ways), ("--query-shots", query_shots), ("--picture", picture)):
        if value:
            raise click.UsageError(f"{name} goes with --data; of its own data a run is judged as its config says")
    from metadist.finished import evaluate as run_evaluate
    from metadist.tracking.console import judged

    result = run_evaluate(run_dir, episodes, {"code": allowed(allow_code)}, which=checkpoint)
    where = f"{result['run_dir']} at step {result['version']}"
    click.echo(json.dumps(result) if as_json else f"{where}: {judged(result)}")


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--version", type=click.IntRange(min=1), help="Up to this checkpoint.  [default: the newest]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@code_option
def replay(run_dir: Path, version: int | None, as_json: bool, allow_code: bool) -> None:
    """Make an asynchronous run's weights again from its log, and compare them.

    Exits with 1 if a bit differs from the checkpoint.

    \b
    Example:
      metadist replay runs/sines --version 500
    """
    from metadist.finished import replay as run_replay

    result = run_replay(run_dir, version, allowed(allow_code))
    said = "are the checkpoint's, bit for bit" if result["same"] else "are NOT the checkpoint's"
    where = f"{result['run_dir']} at step {result['version']}"
    click.echo(json.dumps(result) if as_json else f"{where}: the replayed weights {said}")
    if not result["same"]:
        sys.exit(1)


@main.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--list", "list_members", is_flag=True, help="Name every member of every family.")
@click.option("--microbatch-ms", type=click.FloatRange(min=0, min_open=True), help="Which a worker computes for.")
@click.option("--model-mb", type=click.FloatRange(min=0, min_open=True), help="Of the model, in float32.")
def check(
    config: Path | None,
    overrides: tuple[str, ...],
    list_members: bool,
    microbatch_ms: float | None,
    model_mb: float | None,
) -> None:
    """Validate CONFIG and print it with every default spelled out.

    If it runs over Ray, comments at the end say what an update takes beside computing, as simulated; what most of that
    is; and which topology or number of server shards would be clearly faster. --microbatch-ms and --model-mb are for
    these.

    \b
    Example:
      metadist check configs/glyphs_maml.yaml outer.lr=1e-3
      metadist check configs/glyphs_maml.yaml runtime.workers=16 --microbatch-ms 200
      metadist check --list
    """
    from metadist.config import load_config, to_yaml
    from metadist.config.listing import families

    if list_members:
        for name, members in families().items():
            click.echo(f"{name}:")
            for member, line in members:
                click.echo(f"  {member:<12} {line}")
        return
    if config is None:
        raise click.UsageError("give a CONFIG, or --list")
    checked = load_config(config, overrides)
    click.echo(to_yaml(checked), nl=False)
    if checked.runtime.type == "ray":
        from metadist.simulator import advice

        seconds = None if microbatch_ms is None else microbatch_ms / 1e3
        for line in advice.of_config(checked, seconds, None if model_mb is None else model_mb * 1e6):
            click.echo(f"# {line}")


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--write", is_flag=True, help="Put the fastest way into CONFIG; its comments and layout stay.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Timed calls of each way.")
@click.option("--no-compile", is_flag=True, help="Leave inductor out, which takes a minute or two for each way.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@code_option
def bench(
    config: Path,
    overrides: tuple[str, ...],
    write: bool,
    rounds: int,
    no_compile: bool,
    as_json: bool,
    allow_code: bool,
) -> None:
    """Time the ways to run CONFIG's meta-gradient on this machine.

    Each is compared with plain automatic differentiation first, and left out if it takes more than engine.memory.
    How many tasks are computed together (outer.tasks_per_microbatch) changes the last bits of a run; nothing else that
    is tried changes what is learned.

    \b
    Example:
      metadist bench configs/glyphs_maml.yaml --no-compile
      metadist bench configs/glyphs_maml.yaml --write
    """
    from metadist.benchmark import EngineBench
    from metadist.config import load_config, with_values
    from metadist.experiment import Experiment
    from metadist.files import write_atomically
    from metadist.tracking.console import table

    def say(line: str) -> None:
        click.echo(f"  {line}", err=True)

    code = allowed(allow_code, overrides)
    engine = EngineBench(Experiment(load_config(config, overrides), code=code), rounds, not no_compile, say)
    best = engine.run()
    least = best.ms_per_task or 0.0
    rows = [{**t.row(least), "auto": t.way == engine.automatic} for t in engine.timings.values()]
    rows.sort(key=lambda r: r["ms_per_task"] or float("inf"))
    if as_json:
        click.echo(json.dumps({"rows": rows}))
    else:
        click.echo(table(_BENCH_COLUMNS, [_bench_row(r) for r in rows]))
    if write:
        chosen = {("engine", k): v for k, v in best.way.engine.items()}
        chosen["outer", "tasks_per_microbatch"] = best.way.tasks
        write_atomically(config, with_values(config.read_text(), chosen, str(config)))
        click.echo(f"{config} now says: {best.way.name}", err=True)


_BENCH_COLUMNS = (
    "strategy", "compile", "convolution", "recompute", "together", "ms a task", "of the best", "first call", "MB",
    "error", "",
)  # fmt: skip


def _bench_row(row: dict[str, Any]) -> tuple[str, ...]:
    settings = [str(row[k]) for k in ("strategy", "compile", "convolution", "recompute", "tasks_per_microbatch")]
    if row["ms_per_task"] is None:
        return (*settings, "", "", "", "", "", row["reason"])
    memory = "" if row["memory_mb"] is None else f"{row['memory_mb']:.1f}"
    times = (f"{row['ms_per_task']:.2f}", f"{row['ratio_to_best']:.2f}", f"{row['first_call_s']:.1f} s")
    note = "what auto takes" if row["auto"] else ""
    return (*settings, *times, memory, f"{row['relative_error']:.0e}", note)


main.add_command(data)
main.add_command(submit)
main.add_command(doctor)
main.add_command(adapt)
main.add_command(export)
main.add_command(serve)


def _stoppable(run: Callable[[], Any]) -> None:
    from metadist.stopping import Interrupted

    try:
        run()
    except Interrupted as e:
        how = f"go on with `metadist resume {e.run_dir}`" if e.run_dir else "before the first step: nothing was kept"
        click.echo(f"metadist: stopped; {how}", err=True)
        sys.exit(128 + e.signum)


if __name__ == "__main__":
    main()
