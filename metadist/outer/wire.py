"""Gradients in half the bytes, for the way to the server; what rounding takes away is sent with the next ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from metadist.outer.gradient import Block


class ErrorFeedback:
    """Rounds what one worker sends to bfloat16, and owes the difference.

    After Seide et al. 2014, "1-bit stochastic gradient descent", and Karimireddy et al. 2019, "Error feedback fixes
    SignSGD": what was lost in one step is added to what is sent in the next, so that over the steps
    nothing is but the last difference. It is kept by the worker: a run with it depends on who computed what, and a
    worker that dies takes it along.
    """

    def __init__(self) -> None:
        self._owed: np.ndarray | None = None

    def rounded(self, blocks: Mapping[Block, np.ndarray]) -> dict[Block, np.ndarray]:
        """Partial sums ``[numel]`` as the upper halves of their words, uint16."""
        sent: dict[Block, np.ndarray] = {}
        for block, value in blocks.items():
            wanted = value if self._owed is None else value + self._owed
            words = torch.from_numpy(wanted).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
            sent[block] = words
            with np.errstate(invalid="ignore"):
                error = wanted - widened(words)
            # A gradient that is not finite ends the run elsewhere; it must not be owed for ever.
            self._owed = np.where(np.isfinite(error), error, 0).astype(value.dtype)
        return sent


def widened(value: np.ndarray) -> np.ndarray:
    """What was sent as bfloat16 as float32; anything else as it is."""
    if value.dtype != np.uint16:
        return value
    return (value.astype(np.uint32) << 16).view(np.float32)
