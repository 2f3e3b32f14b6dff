"""What is told of the device."""

from __future__ import annotations

import pytest
import torch

from metadist.device import gpu_state


def test_of_a_cpu_nothing_is_told() -> None:
    assert gpu_state(torch.device("cpu")) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_of_a_gpu_its_memory_is_told_and_how_busy_it_is_where_that_can_be_read() -> None:
    held = torch.zeros(50_000_000, device="cuda")
    told = gpu_state(held.device)
    assert 200 <= told["memory_mb"] < 80_000
    assert 0 <= told.get("utilisation", 0.0) <= 1
