"""The experiment file: a typed schema and its loader. Imports neither torch nor ray."""

from metadist.config.edit import with_values
from metadist.config.load import load_config, parse_override, resolve_overrides, to_yaml, validate
from metadist.config.schema import Config
from metadist.config.section import in_words

__all__ = [
    "Config", "in_words", "load_config", "parse_override", "resolve_overrides", "to_yaml", "validate", "with_values",
]  # fmt: skip
