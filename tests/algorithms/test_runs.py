"""Promises P1 and P2 for every learner, in one process: who computes what, in which order, and a stop in the middle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from metadist.algorithms import BUILT_IN
from metadist.cli import main
from metadist.config import validate
from metadist.experiment import Experiment
from metadist.outer import Layout, sha256_of
from metadist.server import ParameterServer
from metadist.worker import Lease, MetaWorker, Round

from .learners import CASES, MODELS

LISTED = pytest.mark.parametrize("name", CASES)


def sections(name: str, **outer: Any) -> dict[str, Any]:
    """A config of the learner's own smallest kind of run: letters of 12 x 12 pixels."""
    case = CASES[name]
    order = BUILT_IN[case.type].wants_order
    return {
        "name": "tiny",
        "tasks": {"type": "glyphs", "ways": 3, "shots": 2, **({"order": order[0]} if order else {})},
        "model": MODELS[case.model],
        "algorithm": {"type": case.type, **case.options},
        "engine": {"strategy": "vectorised", "compile": False},  # traced and compiled forms: test_contract.py
        "outer": {"steps": 4, "meta_batch_size": 5, "tasks_per_microbatch": 2, "lr": 0.01, **outer},
        "runtime": {"type": "local", "gpus_per_worker": 0},
        "evaluation": {"episodes": 4},
        "tracking": {"console": False, "wandb": {"mode": "disabled"}},
    }


def trained(name: str, workers: int, steps: int = 3) -> str:
    """The sha of the meta-parameters after a few steps by so many workers, the last of them answering first."""
    experiment = Experiment(validate(sections(name)))
    learner = experiment.learner()
    initial = learner.initial_meta_params()
    layout = Layout.of(initial)
    rules = layout.places({k: r.__dict__ for k, r in learner.update_rules().items()})
    server = ParameterServer(layout.flatten(initial).numpy(), {**experiment.config.outer.model_dump(), "rules": rules})
    crew = [MetaWorker(experiment) for _ in range(workers)]
    for version in range(steps):
        round = Round("train", version, "train", "train", version * 5, 5, 2, held=learner.tasks_held_for)
        cuts = np.linspace(0, round.microbatches, workers + 1).round().astype(int).tolist()
        leases = [Lease(i, round, a, z) for i, (a, z) in enumerate(zip(cuts, cuts[1:], strict=False)) if a < z]
        weights = server.weights()
        for i in reversed(range(len(leases))):
            _, blocks = crew[(i + version) % workers].compute(leases[i], [weights])
            server.add(version, round.microbatches, blocks)
        server.commit(version, round.tasks)
    for worker in crew:
        worker.close()

    return sha256_of(layout.unflatten(torch.from_numpy(server.weights())))


@LISTED
def test_any_number_of_workers_in_any_order_gives_one_answer(name: str) -> None:
    alone = trained(name, 1)
    assert trained(name, 2) == alone == trained(name, 3)


@LISTED
@pytest.mark.parametrize("strategy", ["vectorised", pytest.param("adjoint", marks=pytest.mark.slow), "loop"])
def test_no_learner_writes_to_the_weights_it_is_given(name: str, strategy: str) -> None:
    """They may lie in memory that every process of the node reads, where writing would end the process."""
    made = sections(name)
    experiment = Experiment(validate({**made, "engine": {**made["engine"], "strategy": strategy}}))
    worker = MetaWorker(experiment)
    weights = worker.layout.flatten(worker.learner.initial_meta_params()).numpy()
    assert min(p.data_ptr() for p in worker._params(0, [weights]).values()) == weights.ctypes.data, "it made a copy"
    before = weights.tobytes()
    held = worker.learner.tasks_held_for
    for kind, tasks in (("train", 5), ("evaluate", 2)):
        round = Round(kind, 0, "train", kind, 0, tasks, 2, held=held if kind == "train" else 1)  # type: ignore[arg-type]
        worker.compute(Lease(0, round, 0, round.microbatches), [weights])
    worker.close()
    assert weights.tobytes() == before


def test_a_users_own_learner_gets_a_copy() -> None:
    experiment = Experiment(validate(sections("maml")))
    assert not experiment.has_learner_of_its_own
    made = sections("maml")
    config = validate({**made, "model": {"type": "custom", "import_path": "torch.nn:Identity"}})
    assert Experiment(config, code=True).has_learner_of_its_own
    worker = MetaWorker(experiment)
    worker._reads_in_place = False
    weights = worker.layout.flatten(worker.learner.initial_meta_params()).numpy()
    given = worker._params(0, [weights])
    assert all(torch.equal(given[k], v) for k, v in worker.learner.initial_meta_params().items())
    before = weights.tobytes()
    next(iter(given.values())).add_(1.0)
    assert weights.tobytes() == before
    worker.close()


@pytest.mark.parametrize(
    ("first", "last", "kind", "wire", "rooms"),
    [
        (1, 2, "train", "float32", 1), (0, 4, "train", "float32", 1),
        (1, 4, "train", "float32", 0),  # two partial sums
        (1, 2, "train", "bfloat16", 0), (0, 4, "train", "bfloat16", 0), (0, 1, "evaluate", "float32", 0),
    ],
)  # fmt: skip
def test_a_partial_sum_is_made_where_there_is_room_for_it(
    first: int, last: int, kind: str, wire: str, rooms: int
) -> None:
    worker = MetaWorker(Experiment(validate({**sections("maml"), "runtime": {"type": "ray", "wire": wire}})))
    weights = [worker.layout.flatten(worker.learner.initial_meta_params()).numpy()]
    given: list[np.ndarray] = []

    def room(count: int, dtype: Any) -> np.ndarray:
        given.append(np.full(count, np.nan, dtype))
        return given[-1]

    lease = Lease(0, Round(kind, 0, "train", kind, 0, 8, 2), first, last)  # type: ignore[arg-type]
    plain = worker.compute(lease, weights)[1] if wire == "float32" else {}  # what is rounded depends on what was before
    found = worker.compute(lease, weights, room)[1]
    worker.close()
    assert len(given) == rooms
    assert all(np.isfinite(v).all() for v in found.values()) or wire == "bfloat16"
    if wire == "float32":
        assert {b: v.tobytes() for b, v in found.items()} == {b: v.tobytes() for b, v in plain.items()}
    for value, place in zip(found.values(), given, strict=False):
        assert value.ctypes.data == place.ctypes.data


def run(words: list[str], run_dir: Path) -> dict[str, Any]:
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads((run_dir / "summary.json").read_text())


@LISTED
@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_stopped_goes_on_to_the_same_weights(name: str, tmp_path: Path) -> None:
    import yaml

    for steps in (2, 4):
        (tmp_path / f"{steps}.yaml").write_text(yaml.safe_dump(sections(name, steps=steps)))
    whole = run(["train", str(tmp_path / "4.yaml"), "--run-dir", str(tmp_path / "whole")], tmp_path / "whole")
    run(["train", str(tmp_path / "2.yaml"), "--run-dir", str(tmp_path / "half")], tmp_path / "half")
    resumed = run(["resume", str(tmp_path / "half"), "outer.steps=4"], tmp_path / "half")
    assert resumed["meta_params_sha256"] == whole["meta_params_sha256"]
    assert resumed["evaluation"] == whole["evaluation"]
    again = CliRunner().invoke(main, ["evaluate", str(tmp_path / "half"), "--json"], catch_exceptions=False)
    assert json.loads(again.output)["mean"] == pytest.approx(whole["evaluation"]["mean"])
