"""Values are put into a config file and nothing else of it changes."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from metadist.config import with_values
from metadist.errors import ConfigError

FLOW = """# What it is for.
engine: {compile: true}   # why
outer: {steps: 10, lr: 1e-3}
name: x
"""
BLOCK = """outer:
  steps: 10   # ten
  lr: 1e-3

engine:
    compile: true
# the end
"""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (FLOW, FLOW.replace("compile: true", "compile: trace, recompute: false").replace("1e-3}", "1e-3, n: 4}")),
        (
            BLOCK,
            BLOCK.replace("compile: true", "compile: trace\n    recompute: false").replace("1e-3", "1e-3\n  n: 4"),
        ),
        ("name: x", "name: x\nengine: {compile: trace, recompute: false}\nouter: {n: 4}\n"),
        ("engine:\nouter: {}\n", "engine: {compile: trace, recompute: false}\nouter: {n: 4}\n"),
    ],
)
def test_layout_and_comments_stay(text: str, wanted: str) -> None:
    made = with_values(text, {("engine", "compile"): "trace", ("engine", "recompute"): False, ("outer", "n"): 4})
    assert made == wanted


words = st.text("abcdefghij", min_size=1, max_size=5)
scalars = st.one_of(st.integers(-9, 9), st.booleans(), st.sampled_from(["trace", "true", "null", "1e3", "a b", ": #"]))
sections = st.dictionaries(words, st.dictionaries(words, scalars, max_size=3), min_size=1, max_size=4)


@given(
    sections, st.dictionaries(st.tuples(words, words), scalars, min_size=1, max_size=4), st.sampled_from([None, False])
)
def test_what_is_read_back_is_what_was_there_with_the_values_put_in(data, values, flow) -> None:
    text = yaml.safe_dump(data, default_flow_style=flow)
    wanted = {k: dict(v) for k, v in data.items()}
    for (section, key), value in values.items():
        wanted.setdefault(section, {})[key] = value
    assert yaml.safe_load(with_values(text, values)) == wanted


def test_a_section_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml.*engine is no mapping"):
        with_values("engine: 3\n", {("engine", "compile"): True}, "my.yaml")
    with pytest.raises(ConfigError, match="not YAML"):
        with_values("engine: {\n", {("engine", "compile"): True})
