"""What is done about losses: by kind, and by how many there were within the window."""

from __future__ import annotations

import pytest

from metadist.runtime.recovery import GiveUp, Limits, Loss, Losses, Replace, Restore, decide

LIMITS = Limits(worker=2, server=1, window_s=10)


def losses(kind: str, *at: float) -> list[Loss]:
    return [Loss(kind, t, "killed") for t in at]


def test_a_worker_is_replaced_and_a_server_restored() -> None:
    assert decide(Loss("worker", 0, "killed"), [], LIMITS) == Replace()
    assert decide(Loss("server", 0, "killed"), [], LIMITS) == Restore()


@pytest.mark.parametrize(
    ("earlier", "loss", "gives_up"),
    [
        (losses("worker", 0), Loss("worker", 1, "x"), False),
        (losses("worker", 0, 1), Loss("worker", 2, "x"), True),
        (losses("worker", 0, 1), Loss("worker", 10, "x"), True),
        (losses("worker", 0, 1), Loss("worker", 10.5, "x"), False),
        (losses("worker", 0, 1), Loss("worker", 2, "drained", expected=True), False),
        ([Loss("worker", 0, "drained", expected=True)] * 9, Loss("worker", 2, "x"), False),
        (losses("worker", 0, 1), Loss("server", 2, "x"), False),
        (losses("server", 0), Loss("server", 2, "x"), True),
        (losses("server", 0), Loss("worker", 2, "x"), False),
    ],
)
def test_too_many_within_the_window_end_the_run(earlier: list[Loss], loss: Loss, gives_up: bool) -> None:
    assert isinstance(decide(loss, earlier, LIMITS), GiveUp) == gives_up


def test_giving_up_says_how_many_of_what_and_what_to_raise() -> None:
    told = decide(Loss("worker", 2, "out of memory"), losses("worker", 0, 1), LIMITS)
    assert isinstance(told, GiveUp)
    assert told.problem == "3 workers died within 10 s, the last of: out of memory"
    assert "runtime.max_worker_restarts" in told.mend
    told = decide(Loss("server", 2, "killed"), losses("server", 1), LIMITS)
    assert isinstance(told, GiveUp) and told.problem.startswith("2 times the parameter server was lost within 10 s")


def test_what_has_left_the_window_is_forgotten_but_counted() -> None:
    kept = Losses(LIMITS)
    for n in range(1000):
        assert kept.note(Loss("worker", n * 6.0, "killed")) == Replace()
    assert kept.counts == {"worker": 1000, "server": 0} and len(kept._past) <= 2
    kept.note(Loss("worker", 6000.0, "drained", expected=True))
    assert kept.counts["worker"] == 1000
