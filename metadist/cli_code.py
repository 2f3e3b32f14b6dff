"""The option that lets a command run what a config names."""

from __future__ import annotations

import os
import sys

import click

code_option = click.option(
    "--allow-code", is_flag=True, help="Import what the config names by import_path. That runs it: read it before."
)


def allowed(flag: bool, overrides: tuple[str, ...] = ()) -> bool | frozenset[str]:
    """What may be imported: all with the flag, else what was typed here, and not only named in a file."""
    typed = (word.partition("=") for word in overrides)
    names = (v for k, _, v in typed if k.endswith(".import_path") or k == "algorithm.loss")
    found = flag or frozenset(v for v in names if ":" in v)
    # Modules may lie in the folder the command is run from; where none are wanted, none there get in the way.
    if found and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return found
