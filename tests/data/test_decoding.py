"""Bytes to arrays to episodes: whole and exact, whatever the shape, and never by running what is in a file."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from metadist.data import decode
from metadist.data.assemble import assemble
from metadist.data.planes import empty_images, planes
from metadist.errors import DataError


def saved(array: NDArray[np.generic], version: tuple[int, int] | None = None) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asanyarray(array), version, allow_pickle=True)
    return out.getvalue()


@given(
    shape=st.lists(st.integers(0, 4), max_size=4), order=st.sampled_from("CF"),
    dtype=st.sampled_from(["u1", "<f8", ">i4", "?", "U3"]), version=st.sampled_from([None, (2, 0), (3, 0)]),
)  # fmt: skip
def test_npy_is_what_numpy_reads(shape: list[int], order: str, dtype: str, version: tuple[int, int] | None) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype, order=order)  # type: ignore[call-overload]
    found = decode.npy(saved(array, version), "x.npy")
    assert found.dtype == array.dtype and found.shape == array.shape and np.array_equal(found, array)


@given(data=st.binary(max_size=30), at=st.integers(0, 130), cut=st.integers(0, 140))
def test_no_bytes_crash_the_npy_reader(data: bytes, at: int, cut: int) -> None:
    whole = saved(np.arange(12, dtype=np.uint8).reshape(3, 4))
    spoilt = (whole[:at] + data + whole[at + len(data) :])[:cut]
    try:
        decode.npy(spoilt, "x.npy")
    except DataError as e:
        assert "is not a plain .npy array" in str(e)


@pytest.mark.parametrize(
    "make",
    [
        lambda: saved(np.array([{"a": 1}], dtype=object)),
        lambda: saved(np.array([(1, "a")], dtype=[("n", "i4"), ("o", object)])),
        lambda: saved(np.arange(12))[:-1],
        lambda: saved(np.arange(12)).replace(b"(12,), ", b"(-1,), "),
        lambda: saved(np.arange(12)).replace(b"(12,), ", b"(9**9,)"),
        lambda: pickle.dumps(np.arange(3)),
    ],
)
def test_an_npy_that_is_none_is_refused_each_time(make: Callable[[], bytes]) -> None:
    for _ in range(2):  # a header that was met before is no safer
        with pytest.raises(DataError, match="x.npy: is not a plain .npy array"):
            decode.npy(make(), "x.npy")


@pytest.mark.parametrize("shape", [(4, 4), (4, 5, 3)])
def test_images_have_the_formats_shape_and_a_networks_memory(shape: tuple[int, ...]) -> None:
    images = empty_images(6, shape)
    assert images.shape == (6, *shape) and planes(images).flags.c_contiguous
    assert planes(images).shape == (6, *shape[2:], *shape[:2])
    assert np.shares_memory(planes(images), images) and planes(images[np.array([1, 3])]).flags.c_contiguous


def test_pixels_are_divided_as_torch_divides() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    support, query = assemble(every, np.zeros((1, 2), dtype=np.int64), 1)
    found = torch.stack([support.x, query.x], 2).flatten()
    assert torch.equal(found, torch.arange(256, dtype=torch.uint8).to(torch.float32).div(255))


@pytest.mark.parametrize("colours", [(), (3,)])
@pytest.mark.parametrize("laid_out", [np.empty_like, lambda x: empty_images(len(x), x.shape[1:])])
def test_one_episode_is_a_row_of_many_and_turns_are_numpys(
    colours: tuple[int, ...], laid_out: Callable[..., object]
) -> None:
    ways, per_class, turns = 4, 3, np.array([[0, 1, 2, 3], [3, 3, 0, 1]])
    drawn = np.random.default_rng(0).integers(0, 256, (2 * ways * per_class, 5, 5, *colours), dtype=np.uint8)
    images: NDArray[np.uint8] = laid_out(drawn)  # type: ignore[assignment]
    images[:] = drawn
    one = [assemble(half.copy(), t, 1) for half, t in zip(np.split(images, 2), turns, strict=True)]
    many = assemble(images, turns, 1)
    for part, each in ((0, 1), (1, 2)):
        for row in range(2):
            assert torch.equal(many[part].x[row], one[row][part].x) and torch.equal(many[part].y[row], one[row][part].y)
            assert one[row][part].y.tolist() == sorted(list(range(ways)) * each)
            assert one[row][part].x.is_contiguous()
    by_class = drawn.reshape(2, ways, per_class, *drawn.shape[1:])
    for row, klass in np.ndindex(2, ways):
        wanted = np.rot90(by_class[row, klass, 0], turns[row, klass])
        found = many[0].x[row, klass].mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert np.array_equal(found.squeeze(-1) if not colours else found, wanted)
