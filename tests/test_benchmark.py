"""`metadist bench`: only right ways are timed, the fastest is found, and what it writes is what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from metadist.algorithms import MAML
from metadist.algorithms.base import Algorithm
from metadist.benchmark import EngineBench, Way, _sizes
from metadist.cli import main
from metadist.config import load_config
from metadist.errors import ConfigError
from metadist.experiment import Experiment

CONFIG = """# Kept.
name: waves
tasks: {type: sinusoid}
model: {type: mlp, hidden: [8]}
algorithm: {type: maml, inner_steps: 2}
outer: {meta_batch_size: 16, steps: 2, lr: 1e-2}   # small
runtime: {type: local}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "waves.yaml"
    path.write_text(CONFIG)
    return path


def test_every_way_is_right_and_the_fastest_is_chosen(config: Path) -> None:
    bench = EngineBench(Experiment(load_config(config)), rounds=1, compile=False)
    best = bench.run()
    timed = [t for t in bench.timings.values() if t.seconds]
    assert {t.way.strategy for t in timed} == {"vectorised", "adjoint", "loop"}
    assert {t.way.tasks for t in timed} == {1, 2, 4, 8, 16} and {t.way.recompute for t in timed} == {False, True}
    assert all(t.error < 1e-4 for t in timed)
    assert best.ms_per_task == min(t.ms_per_task for t in timed)  # type: ignore[type-var]
    assert not any(t.way.compile is True for t in bench.timings.values())


def test_a_way_with_another_gradient_is_not_timed(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = EngineBench._learner

    def broken(self: EngineBench, engine: dict[str, Any]) -> Algorithm:
        learner = right(self, engine)
        if engine["strategy"] == "vectorised":
            learner.inner_lr *= 1.5  # type: ignore[attr-defined]
        return learner

    monkeypatch.setattr(EngineBench, "_learner", broken)
    bench = EngineBench(Experiment(load_config(config)), rounds=1, compile=False)
    assert bench.run().way.strategy != "vectorised"
    wrong = [t for t in bench.timings.values() if t.way.strategy == "vectorised"]
    assert wrong and all("away from the loop's" in t.reason and not t.seconds for t in wrong)


@pytest.mark.slow
def test_a_way_that_takes_too_much_memory_is_not_timed(config: Path) -> None:
    free = EngineBench(Experiment(load_config(config)), rounds=1, compile=False)
    free.run()
    # These two are tried whichever is the fastest.
    held = {way.strategy: t.memory for way, t in reversed(free.timings.items())}
    budget, together = held["loop"], held["vectorised"]
    assert budget and together and budget < together
    bound = EngineBench(Experiment(load_config(config, [f"engine.memory={budget}"])), rounds=1, compile=False)
    best = bound.run()
    assert best.memory is not None and best.memory <= budget
    over = [t for t in bound.timings.values() if "more than engine.memory" in t.reason]
    assert over and not any(t.seconds for t in over)


def test_the_reason_is_told_where_every_way_fails(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: EngineBench, engine: dict[str, Any], tasks: int) -> Any:
        raise RuntimeError("no rule for this\nand more")

    bench = EngineBench(Experiment(load_config(config)), rounds=1, compile=False)
    monkeypatch.setattr(EngineBench, "_call", failing)
    with pytest.raises(ConfigError, match="no way to compute the meta-gradient works: no rule for this$"):
        bench.run()


def test_sizes_leave_work_for_every_worker(config: Path) -> None:
    cases = {(1, 4): [1], (4, 4): [1], (16, 4): [1, 2, 4], (33, 4): [1, 2, 4, 8, 9], (6, 1): [1, 2, 4, 6]}
    assert {case: list(_sizes(*case)) for case in cases} == cases

    def sizes(*overrides: str) -> list[int]:
        return EngineBench(Experiment(load_config(config, overrides))).sizes()

    assert sizes()[-1] == 16
    ray = "runtime.type=ray"
    assert [sizes(ray, f"runtime.workers={n}")[-1] for n in ("2", "auto", "{min: 1, max: 8}")] == [8, 4, 2]


def test_a_learner_that_is_an_object_is_bound_for_each_engine_anew(config: Path) -> None:
    given = MAML(inner_steps=2)
    experiment = Experiment(load_config(config), algorithm=given)
    loop, adjoint = (experiment.with_engine(strategy=s).learner() for s in ("loop", "adjoint"))
    assert [of.engine.strategy for of in (loop, adjoint)] == ["loop", "adjoint"] and not hasattr(given, "engine")


def test_it_says_which_way_auto_takes(config: Path) -> None:
    bench = EngineBench(Experiment(load_config(config, ["engine.strategy=adjoint"])), rounds=1, compile=False)
    bench.run()
    assert bench.automatic == Way("vectorised", "trace", "direct", False, 2) and bench.timings[bench.automatic].seconds


def test_the_choice_is_written_where_it_belongs(config: Path) -> None:
    done = CliRunner().invoke(main, ["bench", str(config), "--no-compile", "--rounds", "1", "--json", "--write"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    best = rows[0]
    assert best["ratio_to_best"] == 1.0 and all(r["ms_per_task"] for r in rows)
    text = config.read_text()
    assert text.startswith("# Kept.\n") and "# small" in text
    written = load_config(config)
    assert written.engine.compile == best["compile"] and written.engine.strategy == best["strategy"]
    assert written.outer.tasks_per_microbatch == best["tasks_per_microbatch"]
    assert written.outer.lr == 1e-2 and torch.get_num_threads() == 1


def test_a_table_for_people(config: Path) -> None:
    done = CliRunner().invoke(main, ["bench", str(config), "--no-compile", "--rounds", "1"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["strategy", "compile"] and len(lines) > 5 and " 1.00 " in lines[1]
    assert config.read_text() == CONFIG
