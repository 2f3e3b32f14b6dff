"""Command lines of metadist that stand in cluster/: do they say what metadist takes?"""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from metadist.cli import main
from metadist.config import load_config
from metadist.config.schema import Config
from tests.conftest import ROOT

IN_IMAGE = "/opt/metadist/"


def train_command(line: str | list[str]) -> tuple[Config, dict[str, object]]:
    """Parses ``metadist train ...`` with metadist's own command, and its config with the overrides.

    Returns:
        The resolved config, and the command's parameters.

    Raises:
        click.UsageError: an option that there is not.
        ConfigError: a key or a value that the config does not take.
    """
    words = shlex.split(line) if isinstance(line, str) else line
    assert words[:2] == ["metadist", "train"], words
    command = main.commands["train"]
    with click.Context(main) as parent:
        params = command.make_context("train", words[2:], parent=parent).params
    config = Path(str(params["config"]))
    if str(config).startswith(IN_IMAGE):
        config = ROOT / str(config).removeprefix(IN_IMAGE)
    return load_config(config, params["overrides"]), params
