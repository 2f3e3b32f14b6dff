"""Gradients in half the bytes: rounded as torch rounds, and nothing lost over the steps but the last difference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metadist.config.schema import RuntimeConfig
from metadist.outer import Block
from metadist.outer.wire import ErrorFeedback, widened


def gradients(steps: int, n: int = 257, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=n) * 10.0 ** rng.uniform(-3, 1, n)).astype(np.float32) for _ in range(steps)]


def test_words_are_those_of_torch_in_half_the_bytes() -> None:
    (value,) = gradients(1)
    (words,) = ErrorFeedback().rounded({Block(0, 0): value}).values()
    assert words.nbytes * 2 == value.nbytes
    assert widened(words).tobytes() == torch.from_numpy(value).to(torch.bfloat16).float().numpy().tobytes()
    assert widened(value) is value


@given(st.integers(1, 60), st.integers(1, 4))
def test_over_the_steps_nothing_is_lost_but_the_last_difference(steps: int, per_step: int) -> None:
    feedback, wanted, sent = ErrorFeedback(), np.zeros(257), np.zeros(257)
    for step in range(steps):
        values = gradients(per_step, seed=step)
        wanted += sum(v.astype(np.float64) for v in values)
        words = feedback.rounded({Block(0, m): v for m, v in enumerate(values)})
        sent += sum(widened(w).astype(np.float64) for w in words.values())
    largest = max(np.abs(v).max() for s in range(steps) for v in gradients(per_step, seed=s))
    assert np.abs(wanted - sent).max() <= largest * 2.0**-7, "the bound does not grow with the steps"


def test_what_is_not_finite_is_sent_and_not_owed() -> None:
    feedback, (value,) = ErrorFeedback(), gradients(1)
    bad = value.copy()
    bad[3], bad[5] = np.inf, np.nan
    (words,) = feedback.rounded({Block(0, 0): bad}).values()
    assert np.isinf(widened(words)[3]) and np.isnan(widened(words)[5])
    (after,) = feedback.rounded({Block(0, 0): value}).values()
    assert np.isfinite(widened(after)).all()


@pytest.mark.parametrize("other", [{"max_staleness": 2}, {"quorum": 0.5}, {"topology": "allreduce"}])
def test_it_is_for_updates_of_a_server_that_waits(other: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="wire"):
        RuntimeConfig(wire="bfloat16", **other)
