"""The flat vector cut into the shards of a parameter server."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from metadist.outer.update import chunk_starts

_TOLERANCE = 1 / 8


def cut(sizes: Sequence[int], shards: int) -> list[tuple[int, int]]:
    """``(start, stop)`` of each shard in the vector of tensors of ``sizes``: consecutive, and about equal.

    A cut falls between two tensors if one of those places is near enough to balance the shards, else within a large
    tensor, at a place where the global norm begins a new chunk: the norm has the same bits over any number of shards.

    Args:
        sizes: numbers in each tensor, in the vector's order.
        shards: how many are wanted. There are fewer if there are not so many places to cut at.
    """
    numel = sum(sizes)
    tensors = [0]
    for size in sizes:
        tensors.append(tensors[-1] + size)
    chunks = [*chunk_starts(sizes), numel]
    cuts = {0, numel}
    for k in range(1, shards):
        ideal = k * numel / shards
        between = _nearest(tensors, ideal)
        near_enough = abs(between - ideal) <= _TOLERANCE * numel / shards
        cuts.add(between if near_enough else _nearest(chunks, ideal))
    return list(pairwise(sorted(cuts)))


def _nearest(places: Sequence[int], wanted: float) -> int:
    at = bisect_left(places, wanted)
    return min(places[max(0, at - 1) : at + 1], key=lambda p: abs(p - wanted))


def part_of_options(options: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """A shard's options of those of the whole vector, ``sizes`` and ``rules`` among them.

    See :class:`~metadist.outer.update.MetaUpdate`. What falls into the shard stands at the shard's own places.
    """
    sizes, at = [], 0
    for size in options["sizes"]:
        inside = min(at + size, stop) - max(at, start)
        if inside > 0:
            sizes.append(inside)
        at += size
    ruled = ((max(a, start), min(z, stop), rule) for a, z, rule in options["rules"])
    rules = [(a - start, z - start, rule) for a, z, rule in ruled if a < z]
    return {**options, "sizes": sizes, "rules": rules}


def part_of_snapshot(snapshot: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The shard's part of a whole server's snapshot (see :meth:`metadist.server.ParameterServer.snapshot`)."""
    state = {k: v[start:stop] if v.ndim else v for k, v in snapshot["outer_state"].items()}
    return {"version": snapshot["version"], "weights": snapshot["weights"][start:stop], "outer_state": state}


def joined_snapshot(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole server's snapshot of its shards', in their order.

    Raises:
        ValueError: they are not of one version.
    """
    versions = {part["version"] for part in parts}
    if len(versions) != 1:
        raise ValueError(f"the shards of the parameter server are at different versions: {sorted(versions)}")
    states = [part["outer_state"] for part in parts]
    # What is not a number for each parameter (the count of Adam's steps) is the same in all of them.
    state = {k: np.concatenate([s[k] for s in states]) if v.ndim else v for k, v in states[0].items()}
    return {"version": versions.pop(), "weights": np.concatenate([p["weights"] for p in parts]), "outer_state": state}
