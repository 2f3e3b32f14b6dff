"""From a YAML file and ``key.sub=value`` words to a checked :class:`~metadist.config.schema.Config`."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from metadist.config.schema import Config
from metadist.errors import ConfigError

MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its surprises: ``1e-3`` is a number, a repeated key an error, aliases are refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not supported", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key must be a word, not {key!r}", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, overrides and checks one experiment.

    Args:
        path: a YAML file.
        overrides: words ``key.sub=value``; each value is read as YAML.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown, missing or wrong.
    """
    data = read_yaml(Path(path))
    return validate(resolve_overrides(data, overrides), where=str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(path, f"holds {path.stat().st_size} bytes, more than the {MAX_BYTES} of any config")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(path, "no such file", _nearest(str(path), known)) from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(path, f"cannot be read ({e})") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping a YAML text holds."""
    try:
        data = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        raise ConfigError(place, f"is not YAML: {getattr(e, 'problem', None) or e}") from None
    if not isinstance(data, dict):
        raise ConfigError(where, f"holds {type(data).__name__}, wanted sections such as tasks, model and algorithm")
    return data


def compose(text: str) -> Any:
    """The nodes of a YAML text with their places in it; None for an empty one."""
    return yaml.compose(text, Loader=_Loader)


def parse_override(word: str) -> tuple[list[str], Any]:
    """``"outer.lr=1e-3"`` becomes ``(["outer", "lr"], 0.001)``."""
    key, equals, text = word.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        raise ConfigError(word, "is not of the form key.sub=value", "for example outer.lr=1e-3")
    try:
        return key.split("."), yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as e:
        raise ConfigError(word, f"has a value that is not YAML ({getattr(e, 'problem', e)})") from None


def resolve_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``data`` with the words of ``overrides`` merged in, later ones over earlier ones.

    A word that changes a section's ``type`` drops the fields which the file gave to the old type and the
    new one does not know.
    """
    merged = _copy(data)
    changes: dict[str, Any] = {}
    for word in overrides:
        path, value = parse_override(word)
        node = changes
        for key in path[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ConfigError(word, f"sets a field of {key}, which an earlier word set to a plain value")
        node[path[-1]] = value
    return _merge(merged, changes, Config)


def validate(data: Mapping[str, Any], where: str = "config") -> Config:
    """A checked config; all its faults in one :class:`ConfigError`."""
    try:
        return Config.model_validate(dict(data))
    except ValidationError as e:
        lines = [_explain(error) for error in e.errors()]
        raise ConfigError(where, "\n  ".join(lines) if len(lines) == 1 else "\n  " + "\n  ".join(lines)) from None


def to_yaml(config: Config) -> str:
    """The resolved config, every default spelled out, in the schema's order."""
    return yaml.safe_dump(_type_first(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _type_first(value: Any) -> Any:
    """Sections with their ``type`` at the head."""
    if not isinstance(value, dict):
        return value
    return {k: _type_first(value[k]) for k in sorted(value, key=lambda k: k != "type")}


# --------------------------------------------------------------------------- merging


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _merge(old: Any, new: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    old = dict(old) if isinstance(old, Mapping) else {}
    members = list(family(schema))
    if "type" in new and new["type"] != old.get("type", _default_type(members)):
        chosen = [m for m in members if _type_of(m) == new["type"]]
        if chosen:
            old = {k: v for k, v in old.items() if k in chosen[0].model_fields}
    kind = new.get("type", old.get("type", _default_type(members)))
    member = next((m for m in members if len(members) == 1 or _type_of(m) == kind), None)
    for key, value in new.items():
        field = member.model_fields.get(key) if member else None
        inner = field.annotation if field else None
        old[key] = _merge(old.get(key), value, inner) if isinstance(value, Mapping) else value
    return old


def family(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for arg in typing.get_args(annotation):
            yield from family(arg)


def _type_of(member: type[BaseModel]) -> Any:
    return member.model_fields["type"].default if "type" in member.model_fields else None


def _default_type(members: list[type[BaseModel]]) -> Any:
    return _type_of(members[0]) if len(members) == 1 else None


# --------------------------------------------------------------------------- words for faults


def _explain(error: ErrorDetails) -> str:
    path, section = _locate(error["loc"])
    kind, context, given = error["type"], error.get("ctx", {}), error.get("input")
    if kind == "extra_forbidden":
        names = sorted(section.model_fields, key=lambda n: n != "type") if section else []
        return f"{path}: there is no such field; {_nearest(path.rsplit('.', 1)[-1], names)}"
    if kind == "missing":
        return f"{path}: is missing; give it a value"
    if kind == "union_tag_not_found":
        members = family(section.model_fields[path.rsplit(".", 1)[-1]].annotation) if section else ()
        return f"{path}.type: is missing; choose one of {', '.join(_for_files(map(_type_of, members)))}"
    if kind == "union_tag_invalid":
        names = _for_files(t.strip(" '") for t in context["expected_tags"].split(","))
        return f"{path}.type: there is no {context['tag']!r}; {_nearest(context['tag'], names)}"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{path}: {message}"
    if context.get("pattern", "").startswith("^[A-Za-z_]") and path.endswith("import_path"):
        message = "wanted package.module:Name"
    return f"{path}: {given!r} will not do: {message[0].lower()}{message[1:]}"


def _for_files(types: Iterable[str]) -> list[str]:
    """The types that a file can choose: ``python`` stands for what only Python can pass."""
    return [t for t in types if t != "python"]


def _locate(loc: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None]:
    """A dotted path without pydantic's union tags, and the section the last name belongs to."""
    names: list[str] = []
    section: type[BaseModel] | None = Config
    pending: list[type[BaseModel]] = []
    for part in loc:
        if pending:
            match = next((m for m in pending if _type_of(m) == part), None)
            section, pending = match or pending[0], []
            if match:
                continue
        if section is not None and str(part) in section.model_fields:
            members = list(family(section.model_fields[str(part)].annotation))
            pending = members if len(members) > 1 else []
            names.append(str(part))
            if len(members) == 1:
                section = members[0]
        elif isinstance(part, int) or (section is not None and part == loc[-1] and not _is_branch(part)):
            names.append(str(part))
    return ".".join(names) or "config", section


def _is_branch(part: Any) -> bool:
    # The arms of a plain union show up as names such as "int" or "literal['auto']".
    return isinstance(part, str) and bool(
        re.match(r"^(int|float|bool|str|literal|constrained|function|tuple|range)", part)
    )


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"choose one of {', '.join(names)}" if names else ""
