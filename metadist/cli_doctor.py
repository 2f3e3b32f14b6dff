"""``metadist doctor``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from metadist.cli_code import allowed, code_option
from metadist.cli_submit import ENV


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option(
    "--address",
    help="The cluster: its dashboard, http://HOST:8265 (the checks run there as a job), or what `ray.init` takes.  "
    "[default: runtime.address; else Ray is started here, as `train` does]",
)
@click.option("--run-dir", help="Where the run is to be kept; every node must be able to write there.")
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=60.0, show_default=True,
    help="Seconds in which a node has to answer; five times as many for its first microbatch.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--as-job", hidden=True, help="Versions where the command was typed; findings go to the log for it.")
@ENV
@code_option
def doctor(
    config: Path | None,
    overrides: tuple[str, ...],
    address: str | None,
    run_dir: str | None,
    timeout: float,
    as_json: bool,
    as_job: str | None,
    env: tuple[str, ...],
    allow_code: bool,
) -> None:
    """Check a cluster, or this machine, before spending hours on it.

    Versions on every node; CPUs, GPUs and shared memory against what CONFIG asks for; storage and shards from every
    node; the W&B login; the rates of object store and network; a microbatch on every worker. Says what is wrong and how
    to mend it. Without CONFIG, what needs none. Exits with 1 if something is wrong.

    \b
    Example:
      metadist doctor configs/glyphs_maml.yaml
      metadist doctor configs/glyphs_maml.yaml runtime.workers=8 --address http://head:8265 --run-dir /shared/glyphs
    """
    from metadist.config import load_config
    from metadist.doctor.examine import Listener, Wanted, examine
    from metadist.doctor.job import Teller, examine_as_job
    from metadist.doctor.show import Screen
    from metadist.submit import RUNS, Sending

    if config is not None and "=" in config.name and not config.exists():
        raise click.UsageError(f"{config} comes after a CONFIG")
    checked = None if config is None else load_config(config, overrides)
    wanted = Wanted(
        checked, address, run_dir, RUNS if as_job else "runs", allowed(allow_code, overrides), timeout,
        None if as_job is None else json.loads(as_job),
    )  # fmt: skip
    screen: Any = Screen(quiet=as_json) if as_job is None else Teller()
    listener = Listener(screen.checking, screen.found)
    if address is not None and address.startswith(("http://", "https://")):
        report = examine_as_job(address, config, overrides, wanted, Sending(env=env, allow_code=allow_code), listener)
    else:
        report = examine(wanted, listener)
    screen.close()
    if as_json:
        rows = [f.as_dict() for f in report.findings]
        click.echo(json.dumps({"verdict": report.verdict, "checks": rows}))
    code = int(report.verdict == "wrong")
    if report.hung:  # what hangs in a thread must not hold the command
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
