"""``metadist submit``: jobs on a Ray cluster, and looking after them."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import click

from metadist.cli_code import code_option

ADDRESS = click.option(
    "--address",
    help="The cluster's dashboard, http://HOST:8265.  [default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS]",
)
ENV = click.option(
    "--env", multiple=True, metavar="NAME", help="Give the job this variable, with the value it has here; repeatable."
)
_COLUMNS = ("job", "status", "started", "took", "config", "run directory")


class _Submit(click.Group):
    """A group whose own command is the submission: what does not begin with a subcommand's name is one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [_JOB, *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "CONFIG [KEY.SUB=VALUE]... [OPTIONS]")
        formatter.write_usage(ctx.command_path, "status|stop|logs [JOB] [OPTIONS]")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.commands[_JOB].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


class _AsGroup(click.Context):
    """Errors of the submission speak of `metadist submit`."""

    @property
    def command_path(self) -> str:
        return self.parent.command_path if self.parent is not None else super().command_path


class _Submission(click.Command):
    context_class = _AsGroup


_JOB = "job"


@click.group(cls=_Submit)
def submit() -> None:
    """Run CONFIG as a job on a Ray cluster, and follow its log.

    The current folder is sent along. WANDB_API_KEY is too, and what --env names, by the job's environment: never on
    its command line, in its log or in its run. Ctrl-C leaves the job running. The same --run-dir again goes on with
    the run. A file named like a subcommand is given as ./status.

    \b
    Example:
      metadist submit configs/glyphs_maml.yaml --address http://head:8265 --run-dir /shared/runs/glyphs
      metadist submit status --all --address http://head:8265
    """


@submit.command(_JOB, cls=_Submission, hidden=True)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@ADDRESS
@click.option(
    "--run-dir",
    help="Where the job keeps its run, on the head or on shared storage; resumed if it exists.  "
    "[default: ~/metadist-runs/NAME-TIME]",
)
@click.option("--detach", is_flag=True, help="Return at once, and print the job's id.")
@click.option("--image", help="Run in this container image, which holds metadist, in place of sending the folder.")
@ENV
@code_option
def job(
    config: Path,
    overrides: tuple[str, ...],
    address: str | None,
    run_dir: str | None,
    detach: bool,
    image: str | None,
    env: tuple[str, ...],
    allow_code: bool,
) -> None:
    """Run CONFIG as a job on a Ray cluster, and follow its log."""
    from metadist.jobs import Jobs
    from metadist.submit import Sending, submission
    from metadist.submit import submit as send

    if str(config) in submit.commands:
        raise click.UsageError(f"`metadist submit {config}` takes its options after that word; a file is ./{config}")
    made = submission(config, overrides, run_dir, Sending(image=image, env=env, allow_code=allow_code))
    jobs = Jobs(address)
    number = send(jobs, made, _say)
    hints = (
        f"follow: metadist submit logs {number} --follow --address {jobs.address}\n"
        f"look:   metadist submit status {number} --address {jobs.address}\n"
        f"stop:   metadist submit stop {number} --address {jobs.address}\n"
    )
    if detach:
        _say(hints)
        click.echo(number)
        return
    _follow(jobs, number, hints)


@submit.command()
@click.argument("job", required=False)
@click.option("--all", "every", is_flag=True, help="All jobs of the cluster.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@ADDRESS
def status(job: str | None, every: bool, as_json: bool, address: str | None) -> None:
    """Say how a job is, or all of them.

    \b
    Example:
      metadist submit status raysubmit_Xe7cvjyGJCyuCvm2 --address http://head:8265
      metadist submit status --all --address http://head:8265
    """
    from metadist.jobs import Jobs
    from metadist.tracking.console import table

    if every == bool(job):
        raise click.UsageError("give a JOB, or --all")
    jobs = Jobs(address)
    rows = [_row(d) for d in (jobs.all() if job is None else [jobs.details(job)])]
    if as_json:
        click.echo(json.dumps({"jobs": rows}))
    elif not rows:
        click.echo(f"{jobs.address} has no jobs")
    else:
        click.echo(table(_COLUMNS, [tuple(str(r[c.replace(" ", "_")] or "") for c in _COLUMNS) for r in rows]))


@submit.command()
@click.argument("job")
@ADDRESS
def stop(job: str, address: str | None) -> None:
    """End a job: it finishes its step and writes a checkpoint.

    \b
    Example:
      metadist submit stop raysubmit_Xe7cvjyGJCyuCvm2 --address http://head:8265
    """
    from metadist.jobs import Jobs

    jobs = Jobs(address)
    ended = jobs.stop(job)
    click.echo(f"{job} is asked to stop" if ended else f"{job} had ended already")


@submit.command()
@click.argument("job")
@click.option("--follow", "-f", is_flag=True, help="Until the job is over; the exit status is the job's.")
@ADDRESS
def logs(job: str, follow: bool, address: str | None) -> None:
    """Show what a job has written.

    \b
    Example:
      metadist submit logs raysubmit_Xe7cvjyGJCyuCvm2 --follow --address http://head:8265
    """
    from metadist.jobs import Jobs

    jobs = Jobs(address)
    if not follow:
        click.echo(jobs.logs(job), nl=False)
        return
    _follow(jobs, job, f"stop: metadist submit stop {job} --address {jobs.address}\n")


def _follow(jobs: Any, job: str, hints: str) -> None:
    """Shows a job's log and exits as it did; Ctrl-C leaves it running."""
    try:
        succeeded = jobs.follow(job, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        _say(f"\n{job} goes on without being watched\n{hints}")
        sys.exit(130)
    _say(f"job {job} {jobs.details(job).status.value.lower()}\n")
    sys.exit(0 if succeeded else 1)


def _row(details: Any) -> dict[str, Any]:
    kept = details.metadata or {}
    began, ended = details.start_time, details.end_time
    seconds = round(((ended or datetime.datetime.now().timestamp() * 1000) - began) / 1000) if began else None
    return {
        "job": details.submission_id,
        "status": details.status.value.lower(),
        "started": f"{datetime.datetime.fromtimestamp(began / 1000):%Y-%m-%d %H:%M:%S}" if began else None,
        "took": None if seconds is None else str(datetime.timedelta(seconds=seconds)),
        "config": kept.get("metadist_config"),
        "run_directory": kept.get("metadist_run_dir"),
    }


def _say(text: str) -> None:
    click.echo(text, nl=False, err=True)
