"""All-reduce runs: in the server's order they end with the server's bits; a death takes all back to the checkpoint."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from metadist.cli import main
from tests.faults import struck
from tests.ray.test_same_answer_anywhere import (
    CONFIG,
    LOCAL,
    numbers,
    run,
    words,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("no_pictures", "cluster")
ORDERED = {"runtime.type": "ray", "runtime.topology": "allreduce"}


@pytest.fixture(scope="module")
def undisturbed(omniglot_shards, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("allreduce") / "local"
    return run(omniglot_shards, run_dir, **LOCAL, **{"outer.clip_norm": 0.5}), numbers(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_in_order_they_give_the_bits_of_one_process(omniglot_shards, undisturbed, tmp_path, workers):
    summary = run(omniglot_shards, tmp_path / "run", **ORDERED, **{"runtime.workers": workers, "outer.clip_norm": 0.5})
    assert summary["runtime"]["topology"] == "allreduce" and summary["runtime"]["workers"] == workers
    assert summary["meta_params_sha256"] == undisturbed[0]["meta_params_sha256"]
    assert summary["evaluation"] == undisturbed[0]["evaluation"]
    assert numbers(tmp_path / "run") == undisturbed[1]


@pytest.mark.slow
def test_after_a_death_it_goes_on_from_its_checkpoint_to_the_same_bits(omniglot_shards, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    with struck(run_dir, 7) as killed:
        summary = run(omniglot_shards, run_dir, **ORDERED, **{"runtime.workers": 2, "outer.clip_norm": 0.5})
    assert killed and summary["restarts"]["server"] == 1, "the fault was not seen to fire"
    assert summary["meta_params_sha256"] == undisturbed[0]["meta_params_sha256"]
    assert numbers(run_dir) == undisturbed[1]


@pytest.mark.slow
def test_in_any_order_a_run_says_that_it_is_not_reproducible(omniglot_shards, undisturbed, tmp_path):
    changes = {"runtime.type": "ray", "runtime.topology": "allreduce_unordered", "runtime.workers": 3}
    told = CliRunner().invoke(
        main,
        ["train", CONFIG, *words(omniglot_shards, **changes, **{"outer.clip_norm": 0.5, "tracking.console": "true"}),
         "--run-dir", str(tmp_path / "run")],
    )  # fmt: skip
    assert told.exit_code == 0 and "not reproducible" in told.output
    first, others = json.loads(numbers(tmp_path / "run")[0]), json.loads(undisturbed[1][0])
    assert first == pytest.approx(others, rel=1e-4), "the same sum but for rounding"
