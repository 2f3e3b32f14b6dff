"""Counter-based random numbers: a draw is a function of what it is for, never of who makes it.

Every random choice of a run comes from an :class:`Rng` whose Philox-4x64 key is the pair
(seed, stream) and whose counter is the number of the episode. Two processes that ask for episode 17 of
the same stream get the same numbers, whatever either drew before (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3").

Only Philox's raw 64-bit words are taken from NumPy, whose bit generators are frozen; the distributions
are computed here, since NumPy reserves the right to change its own.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_WORD = 1 << 64
_UNIT = 2.0**-53


def stream_id(name: str) -> int:
    """A 64-bit number for a stream's name, the same in every process and version of Python."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class Rng:
    """Random numbers for one purpose.

    Args:
        seed: the run's seed, ``0 <= seed < 2**64``.
        stream: what the numbers are for, e.g. ``"train"`` or ``"init"``.
        index: which member of the stream, e.g. the number of the episode, ``0 <= index < 2**64``.

    Equal arguments give equal numbers; different ones give independent numbers.
    """

    def __init__(self, seed: int, stream: str = "", index: int = 0) -> None:
        for name, value in (("seed", seed), ("index", index)):
            if not 0 <= value < _WORD:
                raise ValueError(f"{name} must be in [0, 2**64), not {value}")
        self.seed, self.stream, self.index = seed, stream, index
        # The two low counter words run within the member (2**128 words); the third tells members apart.
        self._bits = np.random.Philox(
            key=np.array([seed, stream_id(stream)], dtype=np.uint64),
            counter=np.array([0, 0, index, 0], dtype=np.uint64),
        )

    def raw(self, n: int) -> np.ndarray:
        """The next ``n`` words, uint64 ``[n]``."""
        return np.asarray(self._bits.random_raw(n), dtype=np.uint64)

    def integers(self, high: int, size: int) -> np.ndarray:
        """``size`` independent integers in ``[0, high)``, int64 ``[size]``, without modulo bias."""
        if high < 1:
            raise ValueError(f"high must be at least 1, not {high}")
        limit = _WORD - _WORD % high
        words = self.raw(size)
        if limit < _WORD:
            while (bad := words >= np.uint64(limit)).any():
                words[bad] = self.raw(int(bad.sum()))
        return (words % np.uint64(high)).astype(np.int64)

    def integer(self, high: int) -> int:
        """One integer in ``[0, high)``."""
        return int(self.integers(high, 1)[0])

    def choice(self, n: int, k: int) -> np.ndarray:
        """``k`` distinct integers of ``[0, n)`` in random order, int64 ``[k]`` (partial Fisher-Yates)."""
        if not 0 <= k <= n:
            raise ValueError(f"cannot choose {k} of {n} without repetition")
        swapped: dict[int, int] = {}
        chosen = np.empty(k, dtype=np.int64)
        for i in range(k):
            j = i + self.integer(n - i)
            chosen[i] = swapped.get(j, j)
            swapped[j] = swapped.get(i, i)
        return chosen

    def permutation(self, n: int) -> np.ndarray:
        """The integers of ``[0, n)`` in random order, int64 ``[n]``."""
        return self.choice(n, n)

    def uniform(self, low: float = 0.0, high: float = 1.0, size: int | tuple[int, ...] = 1) -> np.ndarray:
        """Uniform numbers of ``[low, high)``, float64 of shape ``size``."""
        shape = (size,) if isinstance(size, int) else size
        unit = (self.raw(math.prod(shape)) >> np.uint64(11)).astype(np.float64) * _UNIT
        return (low + (high - low) * unit).reshape(shape)

    def normal(self, mean: float = 0.0, std: float = 1.0, size: int | tuple[int, ...] = 1) -> np.ndarray:
        """Gaussian numbers, float64 of shape ``size`` (Box-Muller)."""
        shape = (size,) if isinstance(size, int) else size
        n = math.prod(shape)
        pairs = (n + 1) // 2
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(size=pairs)))
        angle = 2.0 * np.pi * self.uniform(size=pairs)
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]
        return (mean + std * both).reshape(shape)

    def torch_seed(self) -> int:
        """A seed for ``torch.manual_seed``, for what torch must draw itself (initialisation, dropout)."""
        return int(self.raw(1)[0] >> np.uint64(1))

    def torch_generator(self) -> torch.Generator:
        """A CPU ``torch.Generator`` seeded from the next word."""
        import torch

        return torch.Generator().manual_seed(self.torch_seed())

    def numpy(self) -> np.random.Generator:
        """A NumPy generator keyed by the next word, for distributions not offered here.

        Its numbers are the same in every process, but may change with the version of NumPy.
        """
        return np.random.Generator(np.random.Philox(key=int(self.raw(1)[0])))
