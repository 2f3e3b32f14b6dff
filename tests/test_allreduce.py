"""What members of an all-reduce run agree on without telling each other."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from metadist.allreduce import _blocks, _summed
from metadist.outer.gradient import partial_sums
from metadist.worker import Lease, Round


@given(st.integers(1, 40), st.data())
def test_everybody_knows_which_partial_sums_a_member_holds(count: int, data: st.DataObject) -> None:
    round = Round("train", 0, "train", "train", 0, count, 1)
    ranges = data.draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(1, count)), max_size=4))
    leases = [Lease(n, round, start, min(start + length, count)) for n, (start, length) in enumerate(ranges)]
    values = [np.full(3, m, np.float64) for m in range(count)]
    held = _summed((partial_sums(n.start, values[n.start : n.stop], count) for n in leases), count)
    assert _blocks(leases, count) == list(held)
    covered = {m for n in leases for m in range(n.start, n.stop)}
    assert sum(held.values(), np.zeros(3)).tolist() == [sum(covered)] * 3, "each microbatch is in it once"
