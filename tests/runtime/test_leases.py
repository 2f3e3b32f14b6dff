"""The ledger of one round: who computes what, decided without clock, process or network."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.runtime.leases import Ledger
from metadist.worker import Lease, Round


def FIVE(lease: Lease) -> float:  # noqa: N802
    return 5.0


def round_of(microbatches: int, version: int = 3) -> Round:
    return Round("train", version, "train", "train", 100, microbatches * 4, 4)


def spans(dealt: list[tuple[int, Lease]]) -> list[tuple[int, int, int]]:
    return [(worker, lease.start, lease.stop) for worker, lease in dealt]


def test_the_last_microbatch_may_be_short() -> None:
    r = Round("train", 0, "train", "train", 100, 10, 4)
    assert r.microbatches == 3
    assert [list(r.episodes(m)) for m in range(3)] == [[100, 101, 102, 103], [104, 105, 106, 107], [108, 109]]


def test_idle_workers_get_equal_consecutive_shares() -> None:
    dealt = Ledger(round_of(8)).deal([2, 5, 7], now=0.0)
    assert spans(dealt) == [(2, 0, 3), (5, 3, 6), (7, 6, 8)]


def test_shares_are_as_they_are_told_and_what_a_gap_cuts_off_goes_to_the_next() -> None:
    assert spans(Ledger(round_of(8)).deal([2, 5, 7], 0.0, lambda n, workers: [1, 0, 7])) == [(2, 0, 1), (7, 1, 8)]
    ledger = Ledger(round_of(5))
    leases = [lease for _, lease in ledger.deal([0, 1, 2, 3, 4], now=0.0)]
    ledger.complete(leases[2])
    for worker in (0, 1, 3, 4):
        ledger.lose(worker)
    assert spans(ledger.deal([7, 8], 0.0, lambda n, workers: [3, 1])) == [(7, 0, 2), (8, 3, 5)]


def test_more_workers_than_work_leaves_some_idle() -> None:
    assert spans(Ledger(round_of(2)).deal([0, 1, 2], now=0.0)) == [(0, 0, 1), (1, 1, 2)]


def test_what_is_lent_is_not_lent_again_at_once() -> None:
    ledger = Ledger(round_of(4))
    ledger.deal([0], now=0.0)
    assert ledger.deal([1], now=0.0) == []
    assert ledger.busy() == {0}


def test_numbers_go_on_from_the_first_and_are_unique() -> None:
    ledger = Ledger(round_of(3), first_number=40)
    assert [lease.number for _, lease in ledger.deal([0, 1, 2], now=0.0)] == [40, 41, 42]
    assert ledger.next_number == 43


def test_a_round_is_finished_when_all_is_answered() -> None:
    ledger = Ledger(round_of(4))
    (_, a), (_, b) = ledger.deal([0, 1], now=0.0)
    assert ledger.complete(b) and not ledger.finished
    assert ledger.complete(a) and ledger.finished
    assert not ledger.complete(a), "a second answer brings nothing new"
    assert ledger.busy() == set()


def test_an_answer_of_another_round_counts_for_nothing() -> None:
    ledger = Ledger(round_of(1, version=3))
    assert not ledger.complete(Lease(0, round_of(1, version=2), 0, 1))
    assert not ledger.finished


def test_a_lost_workers_microbatches_wait_again() -> None:
    ledger = Ledger(round_of(4))
    (_, a), (_, b) = ledger.deal([0, 1], now=0.0)
    assert ledger.lose(0) == 2
    assert ledger.releases == 1
    assert spans(ledger.deal([9], now=1.0)) == [(9, 0, 2)]
    assert ledger.lose(0) == 0 and ledger.releases == 1, "the same death twice is one"


def test_what_the_lost_worker_had_done_stays_done() -> None:
    ledger = Ledger(round_of(2))
    ((_, a),) = ledger.deal([0], now=0.0)
    ledger.complete(a)
    assert ledger.lose(0) == 0 and ledger.finished


def test_gaps_are_lent_as_runs_of_their_own() -> None:
    ledger = Ledger(round_of(5))
    leases = [lease for _, lease in ledger.deal([0, 1, 2, 3, 4], now=0.0)]
    ledger.complete(leases[2])
    for worker in (0, 1, 3, 4):
        ledger.lose(worker)
    assert spans(ledger.deal([7, 8], now=0.0)) == [(7, 0, 2), (8, 3, 5)]


def test_silence_is_leased_a_second_time_once() -> None:
    ledger = Ledger(round_of(2))
    ((_, slow),) = ledger.deal([0], now=10.0)
    assert ledger.deal_again([1], now=14.9, patience=FIVE) == []
    assert spans(ledger.deal_again([1], now=15.1, patience=FIVE)) == [(1, 0, 2)]
    assert ledger.releases == 1
    assert ledger.deal_again([2], now=15.2, patience=FIVE) == []
    assert ledger.complete(slow) and ledger.finished, "the first answer wins"


def test_losing_one_of_two_holders_makes_nothing_wait() -> None:
    ledger = Ledger(round_of(1))
    ledger.deal([0], now=0.0)
    ledger.deal_again([1], now=9.0, patience=FIVE)
    assert ledger.lose(0) == 0 and ledger.deal([2], now=9.0) == []
    assert ledger.lose(1) == 1


def test_the_next_to_be_late_is_known_for_each_size_of_lease() -> None:
    ledger = Ledger(round_of(5))
    assert ledger.next_late(0.0, FIVE, 0.5) == math.inf
    ledger.deal([0, 1], now=0.0, shares=lambda *_: [3, 1])
    ledger.deal([2], now=2.0)

    def a_second_each(lease: Lease) -> float:
        return 1.0 * (lease.stop - lease.start)

    assert ledger.next_late(0.5, a_second_each, 0.0) == 0.5  # the second, of one microbatch
    assert ledger.next_late(2.0, a_second_each, 0.5) == 1.0  # it is late; the others are so a second from now
    assert ledger.next_late(1.2, a_second_each, 0.5) == pytest.approx(-0.2)  # late so shortly that it counts as next
    assert ledger.next_late(9.0, a_second_each, 0.5) == math.inf


def test_the_oldest_silence_is_served_first() -> None:
    ledger = Ledger(round_of(3))
    ledger.deal([0], now=0.0)
    ledger.lose(0)
    ledger.deal([1, 2, 3], now=4.0)
    ledger.lose(2)
    ledger.deal([4], now=2.0)
    assert spans(ledger.deal_again([8], now=20.0, patience=FIVE)) == [(8, 1, 2)]


@settings(deadline=None)
@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.sampled_from(["deal", "again", "answer", "lose"]), st.integers(0, 5)), max_size=40),
)
def test_no_history_loses_or_invents_work(microbatches: int, history: list[tuple[str, int]]) -> None:
    """A microbatch is waiting, held or done, deal gives only what waits, and two holders are the most."""
    ledger, held, done = Ledger(round_of(microbatches)), {}, set()
    for now, (action, worker) in enumerate(history):
        holders = [m for _, lease in held.values() for m in range(lease.start, lease.stop) if m not in done]
        idle = [worker] if worker not in {w for w, _ in held.values()} else []
        if action == "answer" and held:
            number = sorted(held)[worker % len(held)]
            _, lease = held.pop(number)
            fresh = set(range(lease.start, lease.stop)) - done
            assert ledger.complete(lease) == bool(fresh)
            done |= fresh
        elif action == "lose":
            left = {n: h for n, h in held.items() if h[0] != worker}
            still = {m for _, lease in left.values() for m in range(lease.start, lease.stop)}
            assert ledger.lose(worker) == len(set(holders) - still)
            held = left
        elif action in ("deal", "again"):
            dealt = ledger.deal(idle, now) if action == "deal" else ledger.deal_again(idle, now, lambda lease: 3.0)
            for w, lease in dealt:
                given = range(lease.start, lease.stop)
                assert w in idle and lease.number not in held
                assert all(holders.count(m) == (action == "again") for m in given)
                assert not set(given) & done
                held[lease.number] = (w, lease)
        assert ledger.finished == (len(done) == microbatches)
    for worker in range(6):
        ledger.lose(worker)
    rest = {m for _, lease in ledger.deal(range(20), 99.0) for m in range(lease.start, lease.stop)}
    assert rest | done == set(range(microbatches)) and not rest & done
