"""The simulator: closed forms, the controller's own decisions over it, and what more work or less of anything does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.outer.gradient import partial_sums
from metadist.rounds import sums_of
from metadist.simulator import (
    PARTS,
    Arrangement,
    Cluster,
    Compute,
    Costs,
    Deaths,
    Machine,
    Network,
    Work,
    simulate,
    split,
    without,
)
from metadist.simulator.events import Events, Link, Process, Shared

FREE = Cluster()
SERVER, ORDERED, PLAIN = Arrangement(), Arrangement(topology="allreduce"), Arrangement(topology="allreduce_unordered")


def step(work: Work, cluster: Cluster = FREE, arrangement: Arrangement = SERVER) -> float:
    # The first step: the controller does not know yet who is fast.
    return simulate(work, arrangement, cluster, 1, 0).step_s


# ----------------------------------------------------------------- what time does


def test_what_is_shared_is_shared_evenly() -> None:
    events, ends = Events(), {}
    cores = Shared(events, 2)
    for name, seconds in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        cores.submit(seconds, lambda name=name: ends.update({name: events.now}))
    events.run(lambda: len(ends) == 3)
    # Two thirds of a core each until a and b end at 1.5; c then has a whole one for what is left of it.
    assert ends == pytest.approx({"a": 1.5, "b": 1.5, "c": 2.5})


def test_a_process_does_one_thing_after_the_other() -> None:
    events, ends = Events(), []
    cores, memory = Shared(events, 4), Shared(events, 4)
    process = Process(cores, memory)
    for cpu, mem in ((0.5, 1.0), (0.25, 0.0)):
        process.submit(cpu, mem, lambda: ends.append(events.now))
    events.run(lambda: len(ends) == 2)
    assert ends == pytest.approx([1.5, 1.75])


def test_links_send_one_after_another_and_receive_so_too() -> None:
    events, ends = Events(), []
    a, b, c = (Link(events, 10.0) for _ in range(3))
    for sender, receiver in ((a, c), (b, c), (a, b)):
        sender.send(receiver, 20.0, 0.5, lambda: ends.append(events.now))
    events.run(lambda: len(ends) == 3)
    # To c at the same time: 2.5 and 4.5. From a to b after a's first: at 4.5 as well.
    assert ends == pytest.approx([2.5, 4.5, 4.5])


def test_a_simulation_that_waits_for_nothing_says_so() -> None:
    with pytest.raises(RuntimeError, match="stands still"):
        Events().run(lambda: False)


# ----------------------------------------------------------------- closed forms


def test_one_worker_and_no_costs_is_computing_alone() -> None:
    assert step(Work(1, 1e6, Compute(0.2))) == pytest.approx(0.2)
    assert step(Work(1, 1e6, Compute(0.2), microbatches=3)) == pytest.approx(0.6)
    assert simulate(Work(16, 1e6, Compute(0.2)), SERVER, FREE).efficiency == pytest.approx(1.0)


def test_the_driver_does_one_thing_after_another() -> None:
    costs = Cluster(costs=Costs(lease_s=0.01, answer_s=0.02, step_s=0.005))
    assert step(Work(1, 1e6, Compute(0.2)), costs) == pytest.approx(0.2 + 0.01 + 0.02 + 0.005)
    # Nothing to compute: its messages alone.
    assert step(Work(8, 1e6, Compute(0.0)), costs) == pytest.approx(8 * 0.03 + 0.005)
    # The last lease goes out at 8 x 0.01; the answers come 0.01 apart and are heard 0.02 apart, from 0.21 on.
    assert step(Work(8, 1e6, Compute(0.2)), costs) == pytest.approx(0.01 + 0.2 + 8 * 0.02 + 0.005)


def test_where_a_gradient_lies_the_server_hears_with_the_update() -> None:
    costs = Cluster(Machine(cores=2), costs=Costs(worker_s=0.2, commit_s=0.1, add_s=0.03))
    found = simulate(Work(1, 1e6, Compute(1.0)), SERVER, costs, 4, 1)
    assert found.steps_s == pytest.approx([1.0 + 0.2 + 0.1 + 0.03] * 4)


def test_processes_that_are_awake_share_the_cores() -> None:
    two = Cluster(Machine(cores=2), costs=Costs(worker_s=0.1))
    assert step(Work(2, 1e6, Compute(1.0)), two) == pytest.approx(1.1)
    assert step(Work(8, 1e6, Compute(1.0)), two) == pytest.approx(1.0 + 8 * 0.1 / 2)
    crowd = replace(two, costs=Costs(worker_s=0.1, crowd_s=0.02))
    assert step(Work(8, 1e6, Compute(1.0)), crowd) == pytest.approx(1.0 + 8 * (0.1 + 7 * 0.02) / 2)
    parts = replace(two, costs=Costs(part_s=0.01, worker_part_s=0.02))
    assert step(Work(1, 1e6, Compute(1.0)), parts, Arrangement(server_shards=3)) == pytest.approx(1.0 + 2 * 0.03)
    assert step(Work(4, 1e6, Compute(1.0, on_cores=True)), two) == pytest.approx(2.0 + 4 * 0.1 / 2)


def test_a_server_that_the_network_binds_moves_bytes_over_bandwidth() -> None:
    work = Work(4, 8e6, Compute(0.0))
    # Each worker is on a node of its own, the first on the server's. Weights go out to three, one after another, and
    # gradients come in meanwhile, for a link has two directions: the last gradient follows the last weights.
    lan = Cluster(network=Network(1e9), workers_per_node=1)
    assert step(work, lan) == pytest.approx((3 + 1) * 8e6 / 1e9)
    # Half the bytes in gradients.
    assert step(work, lan, Arrangement(wire_bytes=2)) == pytest.approx((3 + 0.5) * 8e6 / 1e9)
    # Shards on all four nodes send a quarter to each of the others.
    assert 2 * 3 * 2e6 / 1e9 <= step(work, lan, Arrangement(server_shards=4)) <= 0.6 * step(work, lan)
    # Two workers a node, whose sums leave it once; weights come to it once in any case.
    pairs = replace(lan, workers_per_node=2)
    assert step(work, pairs) == pytest.approx((8e6 + 16e6) / 1e9)
    assert step(work, pairs, Arrangement(node_sums=True)) == pytest.approx((8e6 + 8e6) / 1e9)


def test_latency_is_paid_by_what_waits_for_a_message() -> None:
    away = Cluster(network=Network(latency_s=0.01), workers_per_node=1)
    # The lease, the weights, the answer, the gradient; the server is beside the driver.
    assert step(Work(2, 8e6, Compute(0.1)), away) == pytest.approx(0.1 + 4 * 0.01)


def test_sum_and_update_take_what_is_read_and_written() -> None:
    work = Work(4, 8e6, Compute(0.0))
    assert step(work, Cluster(Machine(sum_bytes_per_s=1e9))) == pytest.approx(5 * 8e6 / 1e9)
    assert step(work, Cluster(Machine(updates_per_s=1e9))) == pytest.approx(2e6 / 1e9)
    two = Cluster(Machine(sum_bytes_per_s=1e9, threads=2))
    assert step(work, two, Arrangement(server_shards=2)) == pytest.approx(5 * 4e6 / 1e9)
    # Of two shards on one thread's worth of memory, neither is faster than one shard.
    one = Cluster(Machine(sum_bytes_per_s=1e9, threads=1))
    assert step(work, one, Arrangement(server_shards=2)) == pytest.approx(5 * 8e6 / 1e9)
    # Writing gradients, side by side; weights are updated and read where they lie, if they lie in one place.
    store = Cluster(Machine(copy_bytes_per_s=1e9))
    assert step(work, store) == pytest.approx(8e6 / 1e9)
    assert step(work, store, Arrangement(server_shards=2)) == pytest.approx(2 * 8e6 / 1e9)
    # Other nodes get them as an object, which is written once, and copy it.
    assert step(Work(2, 8e6, Compute(0.0)), replace(store, workers_per_node=1)) == pytest.approx(3 * 8e6 / 1e9)


def test_a_ring_moves_twice_the_model_whatever_the_number_of_workers() -> None:
    for workers in (2, 8, 50):
        lan = Cluster(network=Network(1e9), workers_per_node=1)
        expected = 2 * (workers - 1) / workers * 8e6 / 1e9
        assert step(Work(workers, 8e6, Compute(0.1)), lan, PLAIN) == pytest.approx(0.1 + expected)


def test_the_ordered_exchange_moves_as_much_where_each_has_one_block() -> None:
    work, lan = Work(8, 8e6, Compute(0.1)), Cluster(network=Network(1e9), workers_per_node=1)
    assert step(work, lan, ORDERED) == pytest.approx(step(work, lan, PLAIN), rel=1e-3)
    # Eight in a node send seven eighths of what they send to one another: with one node nothing goes over a link.
    assert step(work, replace(lan, workers_per_node=8), ORDERED) == pytest.approx(0.1)


@given(st.integers(1, 40), st.data())
def test_partial_sums_are_as_many_as_the_tree_leaves(count: int, data: st.DataObject) -> None:
    import numpy as np

    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    vectors = [np.zeros(1, np.float32)] * (stop - start)
    assert sums_of(range(start, stop), count) == len(partial_sums(start, vectors, count))


# ----------------------------------------------------------------- the controller's own decisions


def test_one_of_eight_that_is_slow_is_hedged_by_the_controller() -> None:
    work = Work(8, 1e6, Compute(0.1, slow_workers=1, slow_by=5.0))
    plain = simulate(work, Arrangement(duplicates=False), FREE)
    ours = simulate(work, SERVER, FREE)
    assert plain.step_s == pytest.approx(0.5) and plain.releases == 0
    # Late after twice the usual time and 20 ms, then computed once more by somebody idle.
    assert ours.step_s == pytest.approx(0.1 + 0.2 + 0.02, rel=0.02) or ours.step_s == pytest.approx(0.2, rel=0.1)
    assert ours.step_s < 0.65 * plain.step_s and ours.releases > 0
    # With four microbatches for each, the slow one is dealt fewer.
    many = Work(8, 1e6, Compute(0.1, slow_workers=1, slow_by=5.0), microbatches=32)
    assert simulate(many, SERVER, FREE).step_s < 0.6 * simulate(many, Arrangement(duplicates=False), FREE).step_s


def test_a_quorum_leaves_out_the_slow_one() -> None:
    work = Work(8, 1e6, Compute(0.1, slow_workers=1, slow_by=5.0))
    found = simulate(work, Arrangement(quorum=7 / 8), FREE)
    assert 0 < found.left_out <= 1 and found.step_s < 0.2


def test_updates_that_wait_for_nobody_are_as_fast_as_their_workers_together() -> None:
    work = Work(8, 1e6, Compute(0.1, slow_workers=1, slow_by=5.0))
    found = simulate(work, Arrangement(max_staleness=4), FREE)
    together = 8 / (7 / 0.1 + 1 / 0.5)
    assert found.step_s == pytest.approx(together, rel=0.1) and 0 < found.staleness < 4
    assert simulate(work, Arrangement(max_staleness=1), FREE).dropped > 0


def test_a_death_is_leased_again() -> None:
    work = Work(4, 1e6, Compute(1.0), deaths=Deaths(per_hour=600.0, replacement_s=2.0))
    found = simulate(work, SERVER, FREE, steps=12)
    assert found.deaths > 2
    # Whoever held the lease had begun at least once more: by an idle worker, or when the replacement came.
    assert all(took >= 1.0 - 1e-9 for took in found.steps_s) and max(found.steps_s) > 1.0
    assert found.step_s > step(Work(4, 1e6, Compute(1.0)))


# ----------------------------------------------------------------- the same again, and more of anything

COSTLY = Cluster(
    Machine(8, 8e9, 8e9, 1e9, 4, 1e9),
    Network(1e9, 1e-4),
    Costs(1e-3, 1e-3, 2e-4, 1e-3, 2e-3, 1e-5, 1e-4, 1e-3, 1e-3, 1e-5),
    workers_per_node=4,
)
ARRANGEMENTS = st.sampled_from(
    [SERVER, Arrangement(server_shards=3), Arrangement(server_shards=2, node_sums=True), ORDERED, PLAIN]
)


@pytest.mark.parametrize("arrangement", [SERVER, ORDERED, Arrangement(max_staleness=2), Arrangement(quorum=0.7)])
def test_the_same_simulation_gives_the_same_times(arrangement: Arrangement) -> None:
    work = Work(12, 2e7, Compute(0.2, 0.3, 1, 3.0), deaths=Deaths(20.0))
    first, again = (simulate(work, arrangement, COSTLY) for _ in range(2))
    assert first == again
    other = replace(work, compute=replace(work.compute, seed=1))
    assert simulate(other, arrangement, COSTLY).steps_s != first.steps_s


@settings(deadline=None, max_examples=30)
@given(ARRANGEMENTS, st.integers(1, 12), st.floats(1e5, 1e9), st.sampled_from(["cores", "copy", "sum", "link"]))
def test_nothing_is_faster_for_being_slower(arrangement: Arrangement, workers: int, size: float, part: str) -> None:
    work, machine = Work(workers, size, Compute(0.1)), COSTLY.machine
    slower = {
        "cores": replace(COSTLY, machine=replace(machine, cores=1)),
        "copy": replace(COSTLY, machine=replace(machine, copy_bytes_per_s=1e9)),
        "sum": replace(COSTLY, machine=replace(machine, sum_bytes_per_s=1e9)),
        "link": replace(COSTLY, network=Network(1e8, 1e-3)),
    }[part]
    now = simulate(work, arrangement, COSTLY, 1, 0).step_s
    # A node passes its sums on when nobody on it is busy: if they are slower together, that may be one message fewer.
    least = now - (5e-3 if arrangement.node_sums else 1e-9)
    assert simulate(work, arrangement, slower, 1, 0).step_s >= least
    assert simulate(replace(work, model_bytes=2 * size), arrangement, COSTLY, 1, 0).step_s >= least
    assert now >= 0.1


@settings(deadline=None, max_examples=20)
@given(ARRANGEMENTS, st.integers(1, 12), st.floats(1e5, 1e9))
def test_the_parts_of_a_step_add_up_to_it(arrangement: Arrangement, workers: int, size: float) -> None:
    work = Work(workers, size, Compute(0.1, variation=0.2))
    found = split(work, arrangement, COSTLY, 1, 0)
    assert math.fsum(found.seconds.values()) == pytest.approx(found.outcome.step_s)
    assert all(s >= 0 for s in found.seconds.values()) and list(found.seconds) == ["compute", *PARTS]
    assert found.seconds["compute"] == pytest.approx(0.1)


def test_what_binds_is_what_was_made_slow() -> None:
    work = Work(8, 1e8, Compute(0.01))
    machine = COSTLY.machine
    assert split(work, SERVER, replace(COSTLY, network=Network(1e7)), 1, 0).binds == "network"
    assert split(work, SERVER, replace(COSTLY, machine=replace(machine, updates_per_s=1e6)), 1, 0).binds == "update"
    assert split(work, SERVER, replace(COSTLY, machine=replace(machine, sum_bytes_per_s=1e7)), 1, 0).binds == "sum"
    assert split(work, SERVER, replace(COSTLY, costs=replace(COSTLY.costs, lease_s=1.0)), 1, 0).binds == "driver"
    assert split(work, SERVER, replace(COSTLY, costs=replace(COSTLY.costs, worker_s=9.0)), 1, 0).binds == "cores"
    slow = replace(work, compute=Compute(1.0, slow_workers=8, slow_by=9.0))
    assert split(slow, SERVER, COSTLY, 1, 0).binds == "stragglers"
    with pytest.raises(ValueError, match="no part 'weather' of a step; there are stragglers, driver"):
        without("weather", work, COSTLY)
