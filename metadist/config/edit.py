"""Changing a few values of a YAML file and nothing else of it: comments and layout stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from metadist.config.load import compose, parse_yaml
from metadist.errors import ConfigError


def with_values(text: str, values: Mapping[tuple[str, str], Any], where: str = "config") -> str:
    """``text`` with each ``(section, key)`` set to its value, put in where it is missing.

    Args:
        text: a YAML mapping of sections.
        values: scalars by section and key.
        where: names the text in errors.

    Raises:
        ConfigError: it is no such YAML.
    """
    parse_yaml(text, where)
    for (section, key), value in values.items():
        text = _with_value(text, section, key, _scalar(value), where)
    return text


def _with_value(text: str, section: str, key: str, value: str, where: str) -> str:
    root = compose(text)
    found = _value(root, section) if root is not None else None
    if found is None:
        return f"{text.rstrip()}\n{section}: {{{key}: {value}}}\n".lstrip()
    if not isinstance(found, yaml.MappingNode):
        if found.tag.endswith(":null"):
            return text[: found.start_mark.index] + f" {{{key}: {value}}}" + text[found.end_mark.index :]
        raise ConfigError(where, f"{section} is no mapping, so {key} cannot be set in it")
    old = _value(found, key)
    if old is not None:
        return text[: old.start_mark.index] + value + text[old.end_mark.index :]
    if found.flow_style:
        end = found.end_mark.index - 1
        inside = text[:end].rstrip()
        comma = "" if inside.endswith(("{", ",")) else ","
        return f"{inside}{comma}{'' if inside.endswith('{') else ' '}{key}: {value}{text[end:]}"
    last = found.value[-1][1].end_mark.index
    # A block's end lies after the blank lines that follow it.
    last = len(text[:last].rstrip())
    line_end = text.find("\n", last)
    at = len(text) if line_end < 0 else line_end
    return f"{text[:at]}\n{' ' * found.value[0][0].start_mark.column}{key}: {value}{text[at:]}"


def _value(mapping: yaml.Node, key: str) -> yaml.Node | None:
    return next((v for k, v in mapping.value if k.value == key), None)


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
