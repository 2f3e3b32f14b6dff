"""The driver killed at random moments, one of them inside the writing of a checkpoint: it stays one run."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from tests.chaos.harness import STEPS, Disturbed
from tests.chaos.harness import numbers as numbers_of
from tests.faults import steps_of

KILLS, RUNS = 5, 4


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(RUNS))
def test_a_driver_killed_at_any_moment_goes_on_as_the_same_run(
    omniglot_shards: Path, undisturbed: tuple[str, list[str]], tmp_path: Path, seed: int, capsys
) -> None:
    rng = random.Random(seed)
    run_dir = tmp_path / "run"
    run = Disturbed(omniglot_shards, run_dir, **{"tracking.wandb.mode": "offline", "runtime.workers": 2})
    killed: list[int] = []
    try:
        for kill in range(KILLS):
            run.wait_for_step(rng.randrange(steps_of(run_dir) + 1, STEPS * (kill + 1) // KILLS - 10))
            time.sleep(rng.uniform(0, 0.3))
            killed.append(steps_of(run_dir))
            inside_a_checkpoint = (seed, kill) == (1, 2)
            (run._cut_checkpoint if inside_a_checkpoint else run._kill_driver)(rng)
        summary = run.finish()
    finally:
        run.end()
    with capsys.disabled():
        print(f"\nkilled at steps {killed}; sha256 {summary['meta_params_sha256'][:12]}", flush=True)
    assert summary["restarts"]["driver"] >= KILLS
    assert summary["meta_params_sha256"] == undisturbed[0]
    assert numbers_of(run_dir) == undisturbed[1], "a line of metrics.jsonl is missing, doubled or different"
    (run_id,) = {p.name.rsplit("-", 1)[-1] for p in (run_dir / "wandb").glob("offline-run-*")}
    assert run_id == summary["wandb_run"] == (run_dir / ".run_id").read_text()
    assert [json.loads(x)["version"] for x in (run_dir / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, STEPS + 1)
    )
