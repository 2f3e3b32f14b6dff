"""Every member of every family, with a line on what it is for."""

from __future__ import annotations

from pydantic import BaseModel

from metadist.config.load import family
from metadist.config.schema import Config
from metadist.config.section import PythonConfig


def families() -> dict[str, list[tuple[str, str]]]:
    """For each section that has types: its members' names, each with the first line of its docstring."""
    found = {}
    for section, field in Config.model_fields.items():
        members = [m for m in family(field.annotation) if "type" in m.model_fields and not issubclass(m, PythonConfig)]
        if len(members) > 1:
            found[section] = [(str(m.model_fields["type"].default), _first_line(m)) for m in members]
    return found


def _first_line(member: type[BaseModel]) -> str:
    return (member.__doc__ or "").strip().splitlines()[0]
