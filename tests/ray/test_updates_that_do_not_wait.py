"""Asynchronous runs and quorums over Ray: bounded, written down, and made again from what was written."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from metadist.cli import main
from metadist.history import UPDATES
from metadist.tracking.base import PARTS
from metadist.tracking.jsonl import read_lines
from tests.faults import SERVERS, struck, wait_for_step
from tests.ray.test_same_answer_anywhere import (
    CONFIG,
    LOCAL,
    STEPS,
    invoke,
    run,
    started,
    words,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("no_pictures")

TWO = {"runtime.type": "ray", "runtime.workers": 2}
ASYNC = {**TWO, "runtime.max_staleness": 2, "runtime.microbatches_per_update": 3, "runtime.server_shards": 2}
PER_UPDATE, BOUND = 3, 2


def used_of(run_dir: Path) -> list[int]:
    return [entry[1] for line in read_lines(run_dir / UPDATES) for entry in line["applied"]]


def replay(run_dir: Path, *more: str) -> dict:
    result = CliRunner().invoke(main, ["replay", str(run_dir), "--json", *more])
    return {**json.loads(result.stdout), "exit_code": result.exit_code}


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
def test_a_disturbed_asynchronous_run_keeps_its_bound_and_is_replayed_to_the_bit(omniglot_shards, tmp_path):
    run_dir = tmp_path / "run"
    with struck(run_dir, 3) as killed:
        summary = run(omniglot_shards, run_dir, **ASYNC, **{"runtime.staleness_weighting": "inverse"})
    assert killed and summary["restarts"]["worker"] == 1, "the fault was not seen to fire"
    # On to twice the steps: what was done stands, what was open is done.
    invoke(["resume", str(run_dir), f"outer.steps={2 * STEPS}"])
    lines = read_lines(run_dir / UPDATES)
    assert [line["version"] for line in lines] == list(range(1, 2 * STEPS + 1))
    assert sorted(used_of(run_dir)) == list(range(2 * STEPS * PER_UPDATE)), "every microbatch counts once"
    lags = [line["version"] - 1 - base for line in lines for _, _, base, _ in line["applied"]]
    assert max(lags) <= BOUND and any(lags), "with two workers some gradients lag, none by more than the bound"
    metrics = read_lines(run_dir / "metrics.jsonl")
    assert [m["staleness"] for m in metrics] == [sum(lags[i : i + 3]) / 3 for i in range(0, len(lags), 3)]
    for m in metrics:
        assert sum(m[f"{part}_s"] for part in PARTS) == pytest.approx(m["step_s"], rel=1e-6), "time is lost"
    assert sum(m["dropped"] for m in metrics) == sum(len(line["dropped"]) for line in lines)

    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["tasks_seen"] == 2 * STEPS * PER_UPDATE * 2
    replayed = replay(run_dir)
    assert replayed["same"] and replayed["exit_code"] == 0
    assert (replayed["version"], replayed["meta_params_sha256"]) == (2 * STEPS, summary["meta_params_sha256"])
    assert replay(run_dir, "--version", str(2 * STEPS - 5))["same"]

    # The check notices another order, another base and another weight.
    text = (run_dir / UPDATES).read_text().splitlines()
    for change in ("slot", "base", "weight"):
        line = json.loads(text[10])
        first, _, third = line["applied"]
        if change == "slot":
            first[0], third[0] = third[0], first[0]
        elif change == "base":
            first[2] -= 1
        else:
            first[3] /= 3
        (run_dir / UPDATES).write_text("\n".join([*text[:10], json.dumps(line), *text[11:]]) + "\n")
        altered = replay(run_dir)
        assert (altered["same"], altered["exit_code"]) == (False, 1), change


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_an_asynchronous_run_whose_server_was_lost_is_replayed_to_the_bit(omniglot_shards, tmp_path):
    run_dir = tmp_path / "run"
    with struck(run_dir, 8, SERVERS) as lost:
        summary = run(omniglot_shards, run_dir, **ASYNC)
    assert lost and summary["restarts"]["server"] == 1, "the fault was not seen to fire"
    lines = read_lines(run_dir / UPDATES)
    assert [line["version"] for line in lines] == list(range(1, STEPS + 1))
    assert sorted(used_of(run_dir)) == list(range(STEPS * PER_UPDATE)), "every microbatch counts once"
    assert max(v["version"] - 1 - base for v in lines for _, _, base, _ in v["applied"]) <= BOUND
    assert replay(run_dir)["meta_params_sha256"] == summary["meta_params_sha256"]


@pytest.mark.slow
def test_an_asynchronous_run_that_was_killed_goes_on_and_is_replayed_to_the_bit(omniglot_shards, tmp_path):
    run_dir = tmp_path / "run"
    asynchronous = {**LOCAL, "runtime.max_staleness": 4}
    process = started(omniglot_shards, run_dir, **asynchronous)
    wait_for_step(run_dir, 7, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run_dir / "summary.json").exists(), "the kill came too late to test anything"
    invoke(["resume", str(run_dir)])
    assert replay(run_dir)["same"]
    # One worker is never stale: this is the synchronous run.
    run(omniglot_shards, tmp_path / "synchronous", **LOCAL)
    both = [json.loads((d / "summary.json").read_text()) for d in (run_dir, tmp_path / "synchronous")]
    assert both[0]["meta_params_sha256"] == both[1]["meta_params_sha256"]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_run_with_a_quorum_names_what_it_left_out_and_is_replayed_to_the_bit(omniglot_shards, tmp_path):
    run_dir = tmp_path / "run"
    # Eight microbatches over two workers: the shares that come second are left out.
    run(omniglot_shards, run_dir, **TWO, **{"runtime.quorum": 0.5, "runtime.server_shards": 2, "outer.steps": 10})
    lines = read_lines(run_dir / UPDATES)
    assert any(line["left_out"] for line in lines)
    for line in lines:
        slots = [slot for slot, *_ in line["applied"]]
        assert sorted(slots + line["left_out"]) == list(range(8)) and len(slots) >= 4
    assert [m["left_out"] for m in read_lines(run_dir / "metrics.jsonl")] == [len(x["left_out"]) for x in lines]
    assert replay(run_dir)["same"]


def test_replay_says_what_it_lacks(omniglot_shards, tmp_path):
    run(omniglot_shards, tmp_path / "run", **LOCAL, **{"outer.steps": 2})
    result = CliRunner().invoke(main, ["replay", str(tmp_path / "run")])
    assert result.exit_code == 1 and "updates.jsonl: is not there" in result.output
    run(omniglot_shards, tmp_path / "other", **LOCAL, **{"outer.steps": 3, "runtime.max_staleness": 1})
    log = tmp_path / "other" / UPDATES
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], lines[2]]) + "\n")
    result = CliRunner().invoke(main, ["replay", str(tmp_path / "other")])
    assert result.exit_code == 1 and "lacks the update that made version 2" in result.output
    log.write_text(lines[0] + "\n")
    result = CliRunner().invoke(main, ["replay", str(tmp_path / "other")])
    assert result.exit_code == 1 and "has 1 updates, but the checkpoint is of version 3" in result.output


@pytest.mark.parametrize("change", ["runtime.max_staleness=2", "runtime.quorum=0.5"])
def test_a_learner_that_carries_state_refuses_partial_meta_batches(tmp_path, change):
    config = str(Path(CONFIG).parent / "sinusoid_pes.yaml")
    result = CliRunner().invoke(main, ["train", config, "runtime.type=local", change, "--run-dir", str(tmp_path / "x")])
    assert result.exit_code == 2 and change.partition("=")[0] in result.output and "carries state" in result.output
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (["runtime.max_staleness=2", "runtime.quorum=0.5"], "quorum is for updates that wait"),
        (["runtime.microbatches_per_update=2"], "needs max_staleness above 0"),
    ],
)
def test_modes_that_exclude_each_other_are_refused(omniglot_shards, changes, wanted):
    result = CliRunner().invoke(main, ["check", CONFIG, *words(omniglot_shards), *changes])
    assert result.exit_code == 2 and wanted in result.output
