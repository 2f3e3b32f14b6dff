"""Altered shard sets, checkpoints and configs: refused or read, never anything else (``make fuzz`` for thousands)."""

from __future__ import annotations

import os
import random

import pytest

from tests.fuzz import fuzz, targets
from tests.fuzz.mutations import changed, restructured

CASES = int(os.environ.get("FUZZ_CASES", "250"))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", sorted(targets.TARGETS))
def test_altered_files_are_refused_or_read(target: str) -> None:
    told = fuzz.fuzz_apart(target, 0, CASES)
    assert not told["faults"], "\n".join(told["faults"])
    assert told["cases"] == CASES and told["accepted"] == 0 and told["refused"] > 0 and told["read"] > 0
    assert told["grown_mb"] < fuzz.MOST_MB, f"memory grew by {told['grown_mb']:.0f} MB"
    print(told)


def test_the_check_notices_a_reader_that_believes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metadist.checkpoint._seal", lambda data: "0" * 64)
    assert fuzz.fuzz("checkpoints", 0, 1000)["accepted"] > 0


def test_changes_are_drawn_from_their_seed_and_change_something() -> None:
    for seed in range(200):
        data = random.Random(seed).randbytes(50)
        assert changed(data, random.Random(seed)) == changed(data, random.Random(seed)) != data
    value = {"a": [1, {"b": 2}], "c": "d"}
    assert len({repr(restructured(value, random.Random(seed))) for seed in range(100)}) > 30
    assert value == {"a": [1, {"b": 2}], "c": "d"}
