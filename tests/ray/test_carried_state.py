"""What PES carries from one meta-update to the next is the same in one process, over Ray, and after a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metadist as md
from metadist.algorithms import Moment
from metadist.outer.update import MetaUpdate
from metadist.tasks.sinusoid import SinusoidTasks
from metadist.training import resume, train
from metadist.worker import Lease, MetaWorker, Round
from tests.algorithms.test_evolution import experiment


def results(run_dir: Path) -> tuple[str, Any, list[Any]]:
    summary = json.loads((run_dir / "summary.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    told = [(x["version"], x["loss"], x["grad_norm"], x["pre_adaptation_loss"]) for x in lines]
    return summary["meta_params_sha256"], summary["evaluation"], told


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    run_dir = tmp_path_factory.mktemp("carried") / "run"
    train(experiment("pes"), run_dir)
    return results(run_dir)


@pytest.mark.usefixtures("no_pictures")
def test_a_run_stopped_within_a_horizon_and_resumed_has_the_same_bits(undisturbed: Any, tmp_path: Path) -> None:
    train(experiment("pes", outer={"steps": 4}), tmp_path / "run")
    resume(tmp_path / "run", ("outer.steps=8",))
    assert results(tmp_path / "run") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["carried", "xi"])
@pytest.mark.usefixtures("no_pictures")
def test_the_check_of_resuming_notices_lost_state(
    lost: str, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    train(experiment("pes", outer={"steps": 4}), tmp_path / "run")
    load, layout = MetaUpdate.load, experiment("pes").learner().initial_meta_params()

    def forgetful(self: MetaUpdate, vector: Tensor, state: Any, version: int) -> None:
        at = 0
        for name, value in layout.items():
            if name.startswith("carried/") and lost in name:
                vector[at : at + value.numel()] = 0
            at += value.numel()
        load(self, vector, state, version)

    monkeypatch.setattr(MetaUpdate, "load", forgetful)
    resume(tmp_path / "run", ("outer.steps=8",))
    assert results(tmp_path / "run") != undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("cluster")
def test_ray_gives_the_bits_of_one_process(workers: int, undisturbed: Any, tmp_path: Path) -> None:
    train(experiment("pes", runtime={"type": "ray", "workers": workers}), tmp_path / "run")
    assert results(tmp_path / "run") == undisturbed


def test_python_objects_get_the_plan_as_well(tmp_path: Path) -> None:
    run = md.train(
        model=lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)), tasks=SinusoidTasks(),
        algorithm=md.PES(inner_steps=1, horizon=3, pairs=2), outer=md.Outer(steps=4, meta_batch_size=5),
        evaluation={"episodes": 2}, tracking={"console": False, "wandb": {"mode": "disabled"}},
        run_dir=tmp_path / "run",
    )  # fmt: skip
    carried = [k for k in run.learner.meta_params if k.startswith("carried/")]
    assert len(carried) == 5 * 3
    assert run.adapt((torch.zeros(3, 1), torch.zeros(3, 1)))(torch.zeros(2, 1)).shape == (2, 1)


def test_a_task_that_is_not_finite_is_named() -> None:
    """The worker computes tasks one by one to find it: each must then have its own noise and state."""

    worker = MetaWorker(experiment("pes"))
    weights = worker.layout.flatten(worker.learner.initial_meta_params()).numpy()
    round = Round("train", 0, "train", "train", 0, 6, 4, held=3)
    numbers = list(round.episodes(0))
    places = worker.layout.places({"carried/0000/xi": "xi"})
    poisoned = weights.copy()
    width = (places[0][1] - places[0][0]) // 4
    poisoned[places[0][0] + 2 * width] = float("nan")
    report, _ = worker.compute(Lease(0, replace(round, version=1, first=6), 0, 1), [poisoned])
    assert report.bad_tasks == [numbers[2]]
    worker.close()


@pytest.mark.parametrize("held", [1, 5])
def test_the_worker_seeds_every_microbatch_of_every_version_differently(held: int) -> None:

    worker = MetaWorker(experiment("pes"))
    seen: list[tuple[int, int]] = []
    params = worker.learner.initial_meta_params()
    for version in range(6):
        round = Round("train", version, "train", "train", version * 6, 6, 4, held=held)
        for m in range(round.microbatches):
            batch = worker._episodes(round, m)
            worker.learner.moment = Moment()
            worker._microbatch(round, m, params, batch)
            assert (worker.learner.moment.version, worker.learner.moment.microbatch) == (version, m)
            seen.append((worker.learner.moment.seed, torch.initial_seed()))
    assert len(set(seen)) == 12
    worker.close()
