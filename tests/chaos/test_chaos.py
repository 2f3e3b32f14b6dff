"""Promise P2: whatever dies, a run ends with the weights and the record of one that nothing happened to.

``CHAOS_FAULTS`` and ``CHAOS_SEED`` choose how many faults are fired, and which.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.chaos.harness import KINDS, LAST_FAULT, NODE, History, history, schedule, table

A_HISTORY = 5


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_every_disturbed_run_ends_as_the_undisturbed_one(
    omniglot_shards: Path, undisturbed: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted, first = int(os.environ.get("CHAOS_FAULTS", "100")), int(os.environ.get("CHAOS_SEED", "0"))
    histories: list[History] = []
    while sum(len(h.fired) for h in histories) < wanted:
        seed = first + len(histories)
        left = wanted - sum(len(h.fired) for h in histories)
        # Every fifth is on two nodes, one of which is killed as well.
        nodes = 2 if seed % 5 == 4 else 1
        told = history(seed, omniglot_shards, tmp_path, min(A_HISTORY, left), nodes)
        with capsys.disabled():
            names = ", ".join(f"{f.kind} ({f.noticed_s:.1f} s, {f.again} again)" for f in told.fired)
            print(f"\nhistory {seed}, {told.seconds:.0f} s: {names}; restarts {told.restarts}", flush=True)
        assert told.sha256 == undisturbed[0], f"history {seed} ended with other weights"
        assert told.metrics == undisturbed[1], f"history {seed}: a line is missing, doubled or different"
        histories.append(told)
    with capsys.disabled():
        print("\n" + table(histories))
        print(f"{sum(len(h.fired) for h in histories)} faults, {len(histories)} runs, all with sha256 {undisturbed[0]}")


def test_histories_are_drawn_from_their_seed_and_hold_every_kind() -> None:
    assert schedule(3, 5) == schedule(3, 5) != schedule(4, 5)
    drawn = [fault for seed in range(40) for fault in schedule(seed, 5)]
    assert {f.kind for f in drawn} == set(KINDS) and NODE not in KINDS
    assert all(5 <= f.step < LAST_FAULT for f in drawn)
