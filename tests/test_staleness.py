"""Asynchronous updates as decisions: what is taken, judged and given back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadist.staleness import Applied, Flow, weight_of


def test_weights_by_staleness() -> None:
    assert [weight_of(s, "constant") for s in range(3)] == [1, 1, 1]
    assert [weight_of(s, "inverse") for s in range(4)] == [1, 1 / 2, 1 / 3, 1 / 4]


def test_what_is_too_old_is_computed_again_before_anything_new() -> None:
    flow = Flow(total=10, per_update=2, max_staleness=1, weighting="inverse")
    assert [flow.take() for _ in range(3)] == [0, 1, 2]
    assert flow.answer(1, base=3, version=5) is None and flow.dropped == [(1, 3)]
    assert flow.answer(2, base=4, version=5) == Applied(0, 2, 4, 0.5)
    assert not flow.full and flow.take() == 1
    assert flow.answer(1, base=5, version=5) == Applied(1, 1, 5, 1.0)
    assert flow.full
    with pytest.raises(ValueError, match="full"):
        flow.answer(0, 5, 5)
    flow.committed()
    assert (flow.applied, flow.dropped, flow.full) == ([], [], False)
    assert flow.state() == {"next": 3, "open": [0]}


def test_an_answer_nobody_was_asked_for_is_refused() -> None:
    flow = Flow(10, 2, 1)
    flow.take()
    flow.answer(0, 0, 0)
    flow.committed()
    with pytest.raises(KeyError):
        flow.give_back([0])
    with pytest.raises(ValueError, match="not 0"):
        Flow(10, 0, 1)


STEPS = st.lists(st.tuples(st.sampled_from(["take", "answer", "lose", "restart"]), st.integers(0, 9)), max_size=60)


@given(STEPS, st.integers(1, 5), st.integers(0, 3), st.integers(1, 6))
def test_every_microbatch_counts_once_and_none_is_older_than_allowed(
    steps: list[tuple[str, int]], per_update: int, bound: int, updates: int
) -> None:
    flow = Flow(updates * per_update, per_update, bound)
    version = 0
    out: list[tuple[int, int]] = []
    used: list[int] = []
    while version < updates:
        what, pick = steps.pop(0) if steps else ("answer", 0)
        if what == "take" or not out:
            number = flow.take()
            out += [] if number is None else [(number, version)]
        elif what == "answer":
            number, base = out.pop(pick % len(out))
            if (found := flow.answer(number, base, version)) is not None:
                assert found.slot == len(flow.applied) - 1 and version - found.base <= bound
            if flow.full:
                used += [a.microbatch for a in flow.applied]
                flow.committed()
                version += 1
        elif what == "lose":
            number, _ = out.pop(pick % len(out))
            flow.give_back([number])
        elif not flow.applied:
            # A checkpoint is taken between updates; whoever computed is gone with the process.
            flow, out = Flow(updates * per_update, per_update, bound, state=flow.state()), []
    assert sorted(used) == list(range(updates * per_update))
    assert flow.state() == {"next": updates * per_update, "open": []}
