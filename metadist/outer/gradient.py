"""Meta-gradients as flat vectors, and a sum of them whose bits do not depend on the order of arrival."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metadist.outer.vectors import ADD, Addends, Room


@dataclass(frozen=True)
class Layout:
    """Where each named tensor lies in one contiguous vector.

    Args:
        names, shapes, dtypes: of the tensors, in the vector's order.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of ``tensors``, all of them floating point."""
        for name, t in tensors.items():
            if not t.is_floating_point():
                raise ValueError(f"meta-parameter {name!r} is {t.dtype}; only floating-point tensors can be learned")
        return cls(
            tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()), tuple(t.dtype for t in tensors.values())
        )

    @property
    def sizes(self) -> list[int]:
        return [math.prod(s) for s in self.shapes]

    @property
    def numel(self) -> int:
        """Numbers in the vector."""
        return sum(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of the vector."""
        return self.numel * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """Of the vector: the widest of the tensors', and float32 at least."""
        wide = torch.float32
        for d in self.dtypes:
            wide = torch.promote_types(wide, d)
        return wide

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """:attr:`dtype` as numpy has it."""
        return np.dtype(str(self.dtype).removeprefix("torch."))

    def places(self, named: Mapping[str, Any]) -> list[tuple[int, int, Any]]:
        """``(start, stop, what)`` in the vector for each ``name: what``, neighbours with the same ``what`` joined.

        Raises:
            ValueError: a name is not in the layout.
        """
        if unknown := set(named) - set(self.names):
            raise ValueError(f"there is no meta-parameter {min(unknown)!r}")
        found: list[tuple[int, int, Any]] = []
        start = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            if name in named:
                if found and found[-1][1] == start and found[-1][2] == named[name]:
                    found[-1] = (found[-1][0], start + size, named[name])
                else:
                    found.append((start, start + size, named[name]))
            start += size
        return found

    def flatten(self, tensors: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """One vector ``[numel]`` in :attr:`dtype`: ``out``, or a new one where the tensors are; a copy."""
        device = tensors[self.names[0]].device if self.names else None
        flat = torch.empty(self.numel, dtype=self.dtype, device=device) if out is None else out
        start = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            flat[start : start + size].copy_(tensors[name].detach().reshape(-1))
            start += size
        return flat

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """The named tensors of a vector: views where the dtype allows."""
        if flat.shape != (self.numel,):
            raise ValueError(f"the vector holds {tuple(flat.shape)} numbers, this layout has {self.numel}")
        parts = zip(self.names, self.shapes, self.dtypes, torch.split(flat, self.sizes), strict=True)
        return {name: part.view(shape).to(dtype) for name, shape, dtype, part in parts}


HOLD_OF_LEASE = 1 << 28
"""Bytes of gradients that may wait where a lease is computed until they are summed."""


class Block(NamedTuple):
    """A node of the summation tree: microbatches ``[index * 2**level, (index + 1) * 2**level)``."""

    level: int
    index: int  # type: ignore[assignment]  # it hides tuple.index, which nobody needs


class TreeSum:
    """The sum of ``count`` vectors by a fixed binary tree over their numbers.

    Whoever holds all of a node may hand in its partial sum; every addition that is made is
    ``left + right`` of one tree node, so the bits of the total do not depend on who summed what or when.
    Handing a node in twice is harmless.

    Args:
        count: how many vectors there are, at least 1.
        hold: bytes of vectors that may wait to be added. Adding many in one pass is several times as fast as one by
            one, which writes every sum and reads it again.
    """

    def __init__(self, count: int, hold: int = 1 << 31) -> None:
        if count < 1:
            raise ValueError(f"a sum needs at least one vector, not {count}")
        self.count, self.hold = count, hold
        self._held: dict[Block, np.ndarray] = {}

    def add(self, block: Block, value: np.ndarray) -> bool:
        """Takes one node's partial sum, not modified; False if its microbatches are here already."""
        block = Block(*block)
        first, last = self._span(block)
        if not 0 <= first < last:
            raise ValueError(f"{block} lies beyond the {self.count} microbatches of this sum")
        covered = [b for b in self._held if self._overlap(b, block)]
        if any(self._contains(b, block) for b in covered):
            return False
        for b in covered:
            # A larger block has come than the parts of it held so far: take it whole.
            del self._held[b]
        self._held[block] = value
        if sum(v.nbytes for v in self._held.values()) > self.hold:
            self._merge()
        return True

    def discard(self, block: Block) -> None:
        """Lets go of one node's partial sum, if it is here.

        Raises:
            ValueError: it has been added to others.
        """
        block = Block(*block)
        if block not in self._held and any(self._contains(b, block) for b in self._held):
            raise ValueError(f"{block} is part of a larger sum already")
        self._held.pop(block, None)

    def missing(self) -> list[int]:
        """Numbers of the microbatches not handed in yet."""
        there = {m for b in self._held for m in range(*self._span(b))}
        return [m for m in range(self.count) if m not in there]

    def addends(self, members: Sequence[int] | None = None) -> Addends:
        """What is to be added up, and how, for the sum.

        Args:
            members: which microbatches it is to be of; None: all. Where one is left out, its neighbour in the tree
                takes the place of their sum.

        Raises:
            ValueError: they are not what is there.
        """
        wanted = set(range(self.count) if members is None else members)
        there = set(range(self.count)) - set(self.missing())
        if gap := wanted - there:
            raise ValueError(f"the sum still lacks microbatches {sorted(gap)}")
        if extra := there - wanted:
            raise ValueError(f"the sum holds microbatches {sorted(extra)} that should not be in it")
        parts: list[Block] = []
        program: list[int] = []
        self._some(self._root, parts, program)
        return Addends(program, [self._held[b] for b in parts])

    def total(self, members: Sequence[int] | None = None) -> np.ndarray:
        """The sum, only to be read; see :meth:`addends`."""
        return self.addends(members).sum()

    def held(self, room: Room = np.empty) -> dict[Block, np.ndarray]:
        """The partial sums there are, merged as far as they go; what all goes into one lies where ``room`` says."""
        self._merge(room)
        return dict(self._held)

    def _merge(self, room: Room = np.empty) -> None:
        """Puts the sum of each largest node that is there whole in place of its parts."""
        merged: dict[Block, Addends] = {}
        open_ = [self._root]
        while open_:
            node = open_.pop()
            if self._span(node)[0] >= self.count:
                continue
            parts: list[Block] = []
            program: list[int] = []
            if self._whole(node, parts, program):
                merged[node] = Addends(program, [self._held[b] for b in parts])
            elif node.level:
                open_ += self._children(node)
        place = room if len(merged) == 1 else np.empty
        self._held = {node: addends.sum(place) for node, addends in merged.items()}

    @property
    def _root(self) -> Block:
        return Block((self.count - 1).bit_length(), 0)

    def _some(self, node: Block, parts: list[Block], program: list[int]) -> bool:
        """What is held of a node, and how it is added, in postfix; whether there is anything."""
        if node in self._held:
            program.append(len(parts))
            parts.append(node)
            return True
        if not node.level or self._span(node)[0] >= self.count:
            return False
        found = [self._some(child, parts, program) for child in self._children(node)]
        if all(found):
            program.append(ADD)
        return any(found)

    def _whole(self, node: Block, parts: list[Block], program: list[int]) -> bool:
        """Whether all of a node is held; its parts, and how they are added, in postfix."""
        if node in self._held:
            program.append(len(parts))
            parts.append(node)
            return True
        if not node.level:
            return False
        left, right = self._children(node)
        if self._span(right)[0] >= self.count:
            # An only child: the tree's right edge where the count is no power of two.
            return self._whole(left, parts, program)
        if self._whole(left, parts, program) and self._whole(right, parts, program):
            program.append(ADD)
            return True
        return False

    @staticmethod
    def _children(node: Block) -> list[Block]:
        return [Block(node.level - 1, node.index << 1), Block(node.level - 1, (node.index << 1) + 1)]

    def _span(self, block: Block) -> tuple[int, int]:
        return block.index << block.level, min((block.index + 1) << block.level, self.count)

    def _overlap(self, a: Block, b: Block) -> bool:
        (s, e), (t, f) = self._span(a), self._span(b)
        return s < f and t < e

    def _contains(self, outer: Block, inner: Block) -> bool:
        (s, e), (t, f) = self._span(outer), self._span(inner)
        return s <= t and f <= e


def partial_sums(start: int, values: Iterable[np.ndarray], count: int) -> dict[Block, np.ndarray]:
    """Consecutive microbatches from ``start`` summed as far as the tree allows.

    Args:
        start: number of the first.
        values: one vector a microbatch.
        count: microbatches of the whole meta-batch.
    """
    tree = TreeSum(count, hold=HOLD_OF_LEASE)
    for m, value in enumerate(values, start):
        tree.add(Block(0, m), value)
    return tree.held()


def placed(blocks: Mapping[Block, np.ndarray], slot: int | None, weight: float) -> dict[Block, np.ndarray]:
    """Partial sums times a weight; those of a single microbatch at the place ``slot`` of another sum, if one is given.

    Raises:
        ValueError: a slot for more than a microbatch.
    """
    if slot is not None:
        if [Block(*b).level for b in blocks] != [0]:
            raise ValueError(f"slot {slot} takes one microbatch, not {list(blocks)}")
        blocks = {Block(0, slot): value for value in blocks.values()}
    return {b: value if weight == 1.0 else value * value.dtype.type(weight) for b, value in blocks.items()}


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{str(t.dtype).removeprefix('torch.')}\0{','.join(map(str, t.shape))}\0".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
