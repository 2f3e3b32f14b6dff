"""What members of an all-reduce run agree on without telling each other, and the network they meet on."""

from __future__ import annotations

import os
import socket
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadist.allreduce import _blocks, _gloo_by, _interface_to, _summed, meeting_place
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


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not asked for the address of an interface")
def test_members_meet_on_the_interface_that_leads_to_the_first() -> None:
    loopback = _interface_to("127.0.0.1", 9)
    assert loopback in [name for _, name in socket.if_nameindex()] and loopback.startswith("lo")
    assert _interface_to("no host of this name.invalid", 9) == ""


def test_an_interface_that_the_user_names_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with _gloo_by("eth7"):
        assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    with _gloo_by(""):
        assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    with _gloo_by("eth7"):
        assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_a_meeting_place_is_nobody_elses_from_the_time_it_is_told() -> None:
    places = [meeting_place("127.0.0.1") for _ in range(2)]
    assert places[0].port != places[1].port
    for place in places:
        with socket.socket() as other, pytest.raises(OSError):
            other.bind(("127.0.0.1", place.port))
