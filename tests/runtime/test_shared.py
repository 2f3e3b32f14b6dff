"""Arrays in memory that processes share: they are what was written, for as long as somebody reads them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.runtime.messages import packed, unpacked
from metadist.runtime.shared import Reader, Shared, SharedMemoryLost, Writer, can_share

pytestmark = pytest.mark.skipif(not can_share(), reason="this system has no memory that is shared without a file")
ANOTHER = """
import sys
import numpy as np
from metadist.runtime.messages import packed
from metadist.runtime.shared import Writer
(shared,) = Writer().write([{"a": np.arange(5, dtype=np.float32)}])
sys.stdout.buffer.write(packed(shared))
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture
def another() -> Iterator[tuple[subprocess.Popen[bytes], Shared]]:
    """Another process, and what it has written."""
    process = subprocess.Popen([sys.executable, "-c", ANOTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    yield process, unpacked(os.read(process.stdout.fileno(), 1 << 16))
    process.kill()
    process.wait()


def end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.dictionaries(st.integers(0, 9), st.integers(0, 3000), min_size=1, max_size=4), min_size=1, max_size=4),
    st.sampled_from([np.float32, np.float64, np.uint16]),
)
def test_what_was_written_is_read(sizes: list[dict[int, int]], dtype: Any) -> None:
    rng = np.random.default_rng(0)
    parts = [{name: rng.integers(0, 1000, size).astype(dtype) for name, size in part.items()} for part in sizes]
    writer, reader = Writer(), Reader()
    for part, shared in zip(parts, writer.write(parts), strict=True):
        found = reader.read(unpacked(packed(shared)))
        assert found.keys() == part.keys()
        for name, array in found.items():
            assert array.dtype == dtype and array.tobytes() == part[name].tobytes()
    reader.keep(())


def test_what_is_read_cannot_be_written_to() -> None:
    (shared,) = Writer().write([{0: np.zeros(3)}])
    with pytest.raises(ValueError, match="read-only"):
        Reader().read(shared)[0][0] = 1.0


def test_memory_is_written_to_again_once_it_is_let_go_of() -> None:
    writer, reader = Writer(), Reader()
    (first,) = writer.write([{0: np.full(10, 1.0)}])
    (second,) = writer.write([{0: np.full(10, 2.0)}])
    assert first.area != second.area
    seen = reader.read(first)[0]
    writer.let_go([first.area, first.area])
    (third,) = writer.write([{0: np.full(100_000, 3.0)}])  # the same memory, grown
    assert third.area == first.area
    assert reader.read(third)[0].tolist() == [3.0] * 100_000 and reader.read(second)[0].tolist() == [2.0] * 10
    assert seen.tolist() == [3.0] * 10
    (fourth,) = writer.write([{0: np.full(10, 4.0)}])
    assert fourth.area not in (second.area, third.area), "let go of once, it is free once"


def test_what_lies_in_room_that_was_given_is_not_copied() -> None:
    writer, reader = Writer(), Reader()
    room = writer.room(10, np.dtype(np.float32))
    room[:] = np.arange(10)
    low, high = writer.write([{"a": room[:4]}, {"b": room[4:9], "c": room[9:]}])
    assert low.area == high.area
    assert reader.read(low)["a"].tolist() == [0, 1, 2, 3]
    assert [v.tolist() for v in reader.read(high).values()] == [[4, 5, 6, 7, 8], [9]]
    room[5] = 50
    assert reader.read(high)["b"][1] == 50, "it is a copy"
    other = writer.room(10, np.dtype(np.float32))
    other[:] = 7
    assert reader.read(low)["a"].tolist() == [0, 1, 2, 3], "it is somebody's still"
    writer.let_go([low.area])
    for _ in range(2):
        writer.room(10, np.dtype(np.float32))[:] = 1
    assert reader.read(low)["a"].tolist() == [1] * 4, "it was let go of"


@pytest.mark.parametrize("inside", [0, 1, 2])
def test_what_does_not_all_lie_there_is_copied_and_the_room_is_free_again(inside: int) -> None:
    writer, reader = Writer(), Reader()
    rooms = [writer.room(6, np.dtype(np.float64)) for _ in range(2)]
    for i, room in enumerate(rooms):
        room[:] = i
    # None in a room; one of two; each in a room of its own.
    arrays = [rooms[i] if i < inside else np.full(6, float(i)) for i in range(2)]
    (found,) = writer.write([dict(enumerate(arrays))])
    assert [v.tolist() for v in reader.read(found).values()] == [[0] * 6, [1] * 6]
    assert all(not np.shares_memory(v, r) for v in writer.memory(found).values() for r in rooms)
    again = [writer.room(6, np.dtype(np.float64)) for _ in range(2)]
    assert {a.ctypes.data for a in again} == {r.ctypes.data for r in rooms}


def test_room_that_was_not_used_is_free_once_something_is_let_go_of() -> None:
    writer = Writer()
    first = writer.room(6, np.dtype(np.float64)).ctypes.data
    assert writer.room(6, np.dtype(np.float64)).ctypes.data != first
    writer.let_go([])
    assert first in {writer.room(6, np.dtype(np.float64)).ctypes.data for _ in range(2)}


def test_it_stays_with_who_opened_it(another: tuple[subprocess.Popen[bytes], Shared]) -> None:
    process, shared = another
    reader = Reader()
    kept = reader.read(shared)["a"]
    end(process)
    assert reader.read(shared)["a"].tolist() == kept.tolist() == [0, 1, 2, 3, 4]
    reader.forget([shared.area.pid])
    assert kept.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(SharedMemoryLost):
        reader.read(shared)


def test_it_is_lost_with_who_wrote_it(another: tuple[subprocess.Popen[bytes], Shared]) -> None:
    process, shared = another
    end(process)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SharedMemoryLost, match=str(shared.area.pid)):
        Reader().read(shared)
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_file_in_its_place_is_not_taken_for_it() -> None:
    (shared,) = Writer().write([{0: np.zeros(3)}])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SharedMemoryLost, match="another"):
        Reader().read(shared._replace(area=shared.area._replace(tag=b"x" * 16)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_written_in_place_is_seen_by_who_has_it_open() -> None:
    writer, reader = Writer(), Reader()
    (page,) = writer.write([{0: np.zeros(1000), "b": np.ones(3)}])
    seen = reader.read(page)
    writer.memory(page)[0][:] = 3.0
    assert seen[0].tolist() == [3.0] * 1000 and seen["b"].tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="read-only"):
        seen[0][:] = 4.0
