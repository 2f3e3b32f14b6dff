"""Nodes and workers that come and go on a cluster of several nodes: they are let in and out, and P1 is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT


def happened(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.ray.several_nodes", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_nodes_that_join_are_drained_and_die_change_nothing() -> None:
    told = happened("come_and_go")
    assert told["told"] == told["undisturbed"]
    assert told["workers"] == [2, 4], "workers begin on a node that joins"
    assert told["all_on_second"] and told["restarts_by_draining"] == 0, "a drained node is left, which is no failure"
    assert sum("its node is being drained" in event for event in told["events"]) == 2
    for number in told["killed"] + told["lost"]:
        assert any(event.startswith(f"worker {number} died") for event in told["events"]), "a fault did not fire"
    assert len(told["lost"]) == 2 and told["asked_for_after_the_end"] == 0


@pytest.mark.slow
def test_auto_takes_the_room_there_is_as_the_cluster_grows() -> None:
    told = happened("grows")
    assert told["told"] == told["undisturbed"]
    assert told["workers"] == [2, 3, 1, 5] and told["restarts"] == 0
    assert told["asked_for"] == 5, "asks for no more than has room"


@pytest.mark.slow
def test_a_server_leaves_a_node_that_is_drained_and_nothing_is_made_again() -> None:
    told = happened("server_moves")
    assert told["was_there"] and not told["is_there"] and told["losses"] == 0
    assert any("the parameter server moved to another node" in event for event in told["events"])
    assert told["told"] == told["undisturbed"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gradients_lost_with_their_node_are_computed_again() -> None:
    for told in happened("lost_on_the_way").values():
        assert told["told"] == told["undisturbed"]
        assert sum("were lost with a node" in event for event in told["events"]) == 1, "the fault did not fire"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_grid_gives_the_same_bits() -> None:
    told = happened("grid")
    assert len(told["places"]) == 4 * 3 * 2 + 4
    for place in told["places"]:
        assert place["told"] == told["undisturbed"], place
        if "topology" not in place:
            assert place["died"] == 1 and place["joined"] >= 1, "the fault was not seen to fire"
        if place["workers"] > 1:
            assert place["second_leases"], "nothing was given out twice"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_history_gives_the_same_bits() -> None:
    told = happened("histories", *map(str, range(12)))
    for history in told["histories"]:
        assert history["told"] == told["undisturbed"], history
    assert {h.get("server_shards") for h in told["histories"]} == {1, 2, 4, None}, "all-reduce has no shards"
    assert any(h["killed"] for h in told["histories"]) and any(h["second_leases"] for h in told["histories"])
