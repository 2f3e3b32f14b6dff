"""The experiment file: what it means, and what is said to someone who got it wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadist.config import Config, load_config, parse_override, resolve_overrides, to_yaml, validate
from metadist.config.listing import families
from metadist.config.load import MAX_BYTES, parse_yaml
from metadist.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
LEAST = "tasks: {type: glyphs}\nmodel: {type: conv4}\nalgorithm: {type: maml}\n"
SHARDS = "tasks: {type: shards, path: data, %s}\nmodel: {type: conv4}\nalgorithm: {type: maml}\n"


def config(text: str = LEAST, *overrides: str) -> Config:
    return validate(resolve_overrides(parse_yaml(text, "my.yaml"), overrides), "my.yaml")


def fault(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --------------------------------------------------------------------------- faults, word for word


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LEAST + "outer: {lrr: 1}", "outer.lrr: there is no such field; did you mean lr?"),
        (LEAST + "outr: {}", "outr: there is no such field; did you mean outer?"),
        (LEAST + "tracking: {wandb: {mod: x}}", "tracking.wandb.mod: there is no such field; did you mean mode?"),
        (LEAST.replace("glyphs", "glyphs, way: 3"), "tasks.way: there is no such field; did you mean ways?"),
        (
            SHARDS % "sampler: {type: window, blcks: 3}",
            "tasks.sampler.blcks: there is no such field; did you mean blocks?",
        ),
        (
            LEAST + "checkpoint: {zzzz: 3}",
            "checkpoint.zzzz: there is no such field; choose one of every, keep, path, on_error",
        ),
    ],
    ids=["field", "section", "nested", "in a family", "in a family within a family", "nothing near"],
)
def test_an_unknown_key_is_named_with_the_nearest(text: str, message: str) -> None:
    assert fault(text) == f"my.yaml: {message}"


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (LEAST + "outer: {lr: fast}", "outer.lr: 'fast' will not do: input should be a valid number"),
        (LEAST + "outer: {steps: 1.5}", "outer.steps: 1.5 will not do: input should be a valid integer"),
        (LEAST + "outer: {lr: -1}", "outer.lr: -1 will not do: input should be greater than 0"),
        (LEAST + "outer: {lr: .inf}", "outer.lr: inf will not do: input should be a finite number"),
        (LEAST + "outer: {betas: [0.9, 2]}", "outer.betas.1: 2 will not do: input should be less than 1"),
        (LEAST + "outer: 3", "outer: 3 will not do"),
        (LEAST + "name: a/b", "name: 'a/b' will not do"),
        (LEAST + "runtime: {type: rai}", "runtime.type: 'rai' will not do: input should be 'ray' or 'local'"),
        (LEAST.replace("glyphs", "glyphs, ways: 1"), "tasks.ways: 1 will not do: input should be greater than or"),
        (LEAST.replace("conv4", "custom, import_path: a.b"), "model.import_path: 'a.b' will not do: wanted package"),
        (
            LEAST + "outer: {meta_batch_size: 4, tasks_per_microbatch: 5}",
            "outer: tasks_per_microbatch is 5, more than the meta_batch_size of 4; lower it or write auto",
        ),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_was_wanted(text: str, start: str) -> None:
    assert fault(text).startswith(f"my.yaml: {start}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: {type: glyphs}\nmodel: {type: conv4}\n", "algorithm: is missing; give it a value"),
        (LEAST.replace("glyphs", "shards"), "tasks.path: is missing; give it a value"),
        (
            LEAST.replace("type: glyphs", ""),
            "tasks.type: is missing; choose one of glyphs, sinusoid, shards, texts, ratings, custom",
        ),
        (SHARDS % "sampler: {blocks: 3}", "tasks.sampler.type: is missing; choose one of uniform, window"),
    ],
)
def test_what_is_missing_is_named(text: str, message: str) -> None:
    assert fault(text) == f"my.yaml: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LEAST.replace("glyphs", "glyph"), "tasks.type: there is no 'glyph'; did you mean glyphs?"),
        (
            LEAST.replace("conv4", "zzz"),
            "model.type: there is no 'zzz'; choose one of conv4, resnet12, mlp, text_bag, text_conv, text_transformer, "
            "rating, backbone, flatten, custom",
        ),
        (SHARDS % "sampler: {type: windw}", "tasks.sampler.type: there is no 'windw'; did you mean window?"),
    ],
)
def test_an_unknown_type_is_named_with_the_members(text: str, message: str) -> None:
    assert fault(text) == f"my.yaml: {message}"


def test_all_faults_come_at_once() -> None:
    lines = fault(LEAST + "seed: -1\nouter: {steps: 0, lrr: 1}").splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["my.yaml", "seed", "outer.steps", "outer.lrr"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "my.yaml, line 3: is not YAML: the key 'a' appears twice"),
        ("a: {b: 1, b: 2}", "my.yaml, line 1: is not YAML: the key 'b' appears twice"),
        ("a: &x 1\nb: *x", "my.yaml, line 2: is not YAML: aliases (*name) are not supported"),
        ("a: 1\n2: 3", "my.yaml, line 2: is not YAML: a key must be a word, not 2"),
        ("- 1", "my.yaml: holds list, wanted sections such as tasks, model and algorithm"),
        ("", "my.yaml: holds NoneType, wanted sections such as tasks, model and algorithm"),
    ],
)
def test_what_yaml_allows_and_we_do_not(text: str, message: str) -> None:
    assert fault(text) == message


@pytest.mark.parametrize(
    "text", ["a: [1", "a: !!python/object/apply:os.getcwd []", "x: 2020-13-45", "a: \0", "[" * 5000]
)
def test_what_is_not_yaml_is_one_clear_error(text: str) -> None:
    assert "is not YAML: " in fault(text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "maml.yaml").write_text(LEAST)
    with pytest.raises(ConfigError, match=r"mamll.yaml: no such file; did you mean .*maml.yaml\?"):
        load_config(tmp_path / "mamll.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match=f"holds {MAX_BYTES + 1} bytes"):
        load_config(tmp_path / "large.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "bytes.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


# --------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("word", "number"), [("1e-3", 1e-3), ("1E3", 1e3), ("-2.5e+4", -2.5e4), (".5e1", 5.0), ("1.e2", 100.0), ("3", 3)]
)
def test_scientific_notation_is_a_number(word: str, number: float) -> None:
    value = parse_yaml(f"x: {word}", "my.yaml")["x"]
    assert value == number and type(value) is type(number)


@pytest.mark.parametrize("word", ["e3", "1e", "1e-3x", "'1e-3'", "v1e-3"])
def test_what_only_looks_like_one_stays_a_word(word: str) -> None:
    assert isinstance(parse_yaml(f"x: {word}", "my.yaml")["x"], str)


@given(st.floats(1e-12, 1e12))
def test_a_float_survives_as_an_override(number: float) -> None:
    assert parse_override(f"outer.lr={number:e}") == (["outer", "lr"], float(f"{number:e}"))
    assert config(LEAST, f"outer.lr={number!r}").outer.lr == number


# --------------------------------------------------------------------------- overrides


def test_an_override_keeps_its_siblings() -> None:
    text = LEAST.replace("conv4", "conv4, filters: 8, downsample: max_pool") + "outer: {lr: 0.5, steps: 7}"
    made = config(text, "outer.lr=1e-3", "model.filters=16", "tracking.wandb.mode=offline")
    assert (made.outer.lr, made.outer.steps) == (1e-3, 7)
    assert (made.model.filters, made.model.downsample) == (16, "max_pool")
    assert made.tracking.wandb.mode == "offline" and made.tracking.wandb.project == "metadist"


def test_a_mapping_as_an_override_merges_too() -> None:
    assert config(LEAST + "outer: {lr: 0.5, steps: 7}", "outer={steps: 9}").outer.lr == 0.5


def test_the_last_word_counts_and_the_file_is_left_as_it_was() -> None:
    data = parse_yaml(LEAST + "outer: {lr: 0.5}", "my.yaml")
    assert resolve_overrides(data, ["outer.lr=1", "outer.lr=2"])["outer"]["lr"] == 2
    assert data["outer"] == {"lr": 0.5}


def test_changing_a_type_drops_what_the_new_type_does_not_know() -> None:
    text = LEAST.replace("conv4", "conv4, filters: 8").replace("glyphs", "glyphs, ways: 7, shots: 3")
    made = config(text, "model.type=mlp", "model.hidden=[9]", "tasks.type=sinusoid")
    assert made.model.model_dump() == {"type": "mlp", "batchnorm": "transductive", "hidden": (9,)}
    assert made.tasks.model_dump() == {"type": "sinusoid", "shots": 3, "query_shots": 10}


def test_naming_the_type_again_drops_nothing() -> None:
    assert config(LEAST.replace("conv4", "conv4, filters: 8"), "model.type=conv4").model.filters == 8


def test_a_new_types_own_faults_are_told() -> None:
    told = fault(LEAST, "model.type=mlp", "model.filters=8")
    assert told.endswith("model.filters: there is no such field; choose one of type, batchnorm, hidden")


@pytest.mark.parametrize("word", ["outer.lr", "=3", "outer..lr=1", "outer.=1", "a b=1"])
def test_a_word_that_is_no_override(word: str) -> None:
    assert fault(LEAST, word) == f"{word}: is not of the form key.sub=value; for example outer.lr=1e-3"


def test_overrides_that_contradict_or_are_not_yaml() -> None:
    assert "outer.lr=1: sets a field of outer, which an earlier word set" in fault(LEAST, "outer=3", "outer.lr=1")
    assert fault(LEAST, "outer.lr=[1").startswith("outer.lr=[1: has a value that is not YAML")
    assert fault(LEAST, "outer.lrr=1") == "my.yaml: outer.lrr: there is no such field; did you mean lr?"


# --------------------------------------------------------------------------- what is resolved


@pytest.mark.parametrize(("tasks", "wanted"), [(1, 1), (8, 1), (9, 2), (32, 4), (33, 5)])
def test_the_microbatch_is_resolved_from_the_meta_batch_alone(tasks: int, wanted: int) -> None:
    for workers in (1, 7):
        made = config(LEAST, f"outer.meta_batch_size={tasks}", f"runtime.workers={workers}")
        assert made.outer.tasks_per_microbatch == wanted


def resolved(source: Any) -> Config:
    return load_config(source) if isinstance(source, Path) else config(source)


@pytest.mark.parametrize("source", [*SHIPPED, LEAST, SHARDS % "sampler: {type: window, reuse: 1e-3}"], ids=str)
def test_what_is_saved_reads_back_the_same(source: Path | str) -> None:
    made = resolved(source)
    again = validate(parse_yaml(to_yaml(made), "saved.yaml"))
    assert again == made and to_yaml(again) == to_yaml(made)
    assert list(parse_yaml(to_yaml(made), "saved.yaml")) == list(Config.model_fields)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_config_is_valid_named_after_its_file_and_explained(path: Path) -> None:
    made = load_config(path)
    assert made.name == path.stem and path.read_text().startswith("# ")


def test_there_are_shipped_configs() -> None:
    assert {"glyphs_maml.yaml", "sinusoid_maml.yaml"} <= {p.name for p in SHIPPED}


def test_every_member_of_every_family_has_a_line() -> None:
    listed = families()
    assert {"tasks", "model", "algorithm"} <= listed.keys()
    assert ("conv4", "Four convolution blocks with BatchNorm, the usual few-shot image network.") in listed["model"]
    assert all(line for members in listed.values() for _, line in members)


def test_importing_the_config_imports_neither_torch_nor_ray() -> None:
    """A process that only checks a file should not wait seconds for what it does not use."""
    code = "import sys, metadist.config; print([m for m in ('torch', 'ray', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
