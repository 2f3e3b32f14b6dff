"""From a config to the parts that run, and what it says when they do not fit together."""

from __future__ import annotations

from typing import Any

import pytest

from metadist.config import validate
from metadist.errors import ConfigError
from metadist.experiment import EpisodeSize, Experiment

GLYPHS = {"type": "glyphs", "ways": 6, "shots": 2, "query_shots": 3}


def experiment(**changes: Any) -> Experiment:
    sections: dict[str, Any] = {
        "tasks": GLYPHS, "model": {"type": "conv4", "filters": 4}, "algorithm": {"type": "maml"},
        "runtime": {"type": "local", "gpus_per_worker": 0},
    }  # fmt: skip
    return Experiment(validate({**sections, **changes}))


def test_evaluation_may_have_a_size_of_its_own() -> None:
    made = experiment(algorithm={"type": "protonet"}, evaluation={"ways": 4, "shots": 1})
    assert made.evaluation_size == EpisodeSize(ways=4, shots=1)
    episodes = {
        size: made.source("test", size).episodes(0, "x", [0])[0] for size in (EpisodeSize(), made.evaluation_size)
    }
    assert [len(e.support.x) for e in episodes.values()] == [12, 4]
    assert [len(e.query.x) for e in episodes.values()] == [18, 12]


def test_a_size_that_the_tasks_lack_is_refused() -> None:
    made = experiment(tasks={"type": "sinusoid"}, model={"type": "mlp"}, evaluation={"ways": 4})
    with pytest.raises(ConfigError, match=r"evaluation.ways.*sinusoid have no ways.*shots, query_shots"):
        made.source("test", made.evaluation_size)


@pytest.mark.parametrize(
    ("algorithm", "outputs"), [("maml", 6), ("anil", 6), ("protomaml", 6), ("protonet", None), ("matchingnet", None)]
)
def test_the_model_ends_as_the_learner_wants_it(algorithm: str, outputs: int | None) -> None:
    params = experiment(algorithm={"type": algorithm}).learner().model.initial_params()
    assert ("head.weight" in params) == (outputs is not None)
    if outputs:
        assert params["head.weight"].shape == (outputs, 4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"type": "flatten"}}, "model.type.*nothing to learn.*maml"),
        ({"algorithm": {"type": "anil", "head": "nowhere"}}, "algorithm.*no layer 'nowhere'.*head"),
        ({"algorithm": {"type": "boil", "head": "blocks.0.conv"}}, "goes on after its layer 'blocks.0.conv'"),
        ({"algorithm": {"type": "cavia", "layer": "blocks.9"}}, "no layer 'blocks.9'.*blocks.0.conv"),
        ({"tasks": {"type": "sinusoid"}, "model": {"type": "mlp"}, "algorithm": {"type": "protonet"}}, "whole-number"),
        ({"tasks": {"type": "sinusoid"}, "model": {"type": "mlp"}, "algorithm": {"type": "protomaml"}}, "whole-number"),
        (
            {
                "tasks": {**GLYPHS, "order": "shuffled"},
                "algorithm": {"type": "mann", "memory_slots": 4, "read_heads": 9},
            },
            "algorithm.*read_heads must be 1 to memory_slots .4., not 9",
        ),
        ({"tasks": {"type": "sinusoid"}}, "model.type.*conv4 takes pictures.*use mlp"),
    ],
)
def test_parts_that_do_not_fit_are_told_in_words_of_the_config(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace(".*", "(?s:.*)")):
        experiment(**changes).learner()


@pytest.mark.parametrize(("mode", "rows"), [("transductive", None), ("inductive", None), ("running", 2)])
def test_the_batchnorm_mode_reaches_the_model(mode: str, rows: int | None) -> None:
    learner = experiment(model={"type": "conv4", "filters": 4, "batchnorm": mode}).learner()
    assert learner.model.batchnorm == mode
    params = learner.initial_meta_params()
    kept = {k: v for k, v in params.items() if "running" in k}
    assert (len(kept) == 8 and all(v.shape == (rows, 4) for v in kept.values())) if rows else not kept


@pytest.mark.parametrize(
    ("engine", "wanted"),
    [
        ({}, "winograd"),
        ({"compile": False}, "direct"),
        ({"compile": True}, "winograd"),
        ({"compile": True, "strategy": "loop"}, "direct"),
        ({"compile": True, "convolution": "direct"}, "direct"),
        ({"convolution": "columns"}, "columns"),
    ],
)
def test_convolutions_are_products_where_the_gradient_is_traced(engine: dict[str, Any], wanted: str) -> None:
    assert experiment(engine=engine).learner().model.convolution == wanted


def test_a_model_without_batchnorm_has_no_mode() -> None:
    made = experiment(tasks={"type": "sinusoid"}, model={"type": "mlp", "batchnorm": "inductive"})
    assert made.learner().model.batchnorm == "none"
