"""What is done about something lost: decisions as values, without clock, process or network.

===========================  ==========================================================  ======================
lost                         noticed                                                     done
===========================  ==========================================================  ======================
a worker                     at once, by its lease; one that hangs by its silence        replaced, leases dealt
a gradient with its node     when the update is to be made                               computed again
a server shard, its weights  at once, by what it was asked; one that hangs by its silence  restored from checkpoint
a member of an all-reduce    as a worker                                                 restored from checkpoint
===========================  ==========================================================  ======================

What happens too often is not weather but a fault, and ends the run with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["worker", "server"]

_ABOUT = {
    "worker": (
        "workers died",
        "raise runtime.max_worker_restarts if that is to be expected; memory is the usual cause",
    ),
    "server": (
        "times the parameter server was lost",
        "raise runtime.max_server_restarts if that is to be expected; memory is the usual cause",
    ),
}


@dataclass(frozen=True)
class Loss:
    """Something that is gone.

    Args:
        kind: what.
        at: when, in seconds.
        reason: why, in words.
        expected: whether it was told of beforehand, as of a node that is drained.
    """

    kind: Kind
    at: float
    reason: str
    expected: bool = False


@dataclass(frozen=True)
class Replace:
    """Another takes its place; what it held is dealt to others."""


@dataclass(frozen=True)
class Restore:
    """The server starts again from the newest whole checkpoint, and the run with it."""


@dataclass(frozen=True)
class GiveUp:
    """The run ends; it can be resumed."""

    problem: str
    mend: str


Action = Replace | Restore | GiveUp


@dataclass(frozen=True)
class Limits:
    """How often something may be lost.

    Args:
        worker, server: how many times within the window.
        window_s: seconds.
    """

    worker: int
    server: int
    window_s: float


def decide(loss: Loss, earlier: Sequence[Loss], limits: Limits) -> Action:
    """What to do about a loss, given those before it."""
    if not loss.expected:
        recent = [past for past in [*earlier, loss] if _counts(past, loss, limits.window_s)]
        if len(recent) > getattr(limits, loss.kind):
            what, mend = _ABOUT[loss.kind]
            return GiveUp(f"{len(recent)} {what} within {limits.window_s:g} s, the last of: {loss.reason}", mend)
    return Replace() if loss.kind == "worker" else Restore()


def _counts(past: Loss, loss: Loss, window_s: float) -> bool:
    return past.kind == loss.kind and not past.expected and loss.at - past.at <= window_s


class Losses:
    """The losses of a run so far.

    Args:
        limits: how many it bears.

    ``counts`` says how many were unexpected, by kind.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.counts: dict[str, int] = {"worker": 0, "server": 0}
        self._past: list[Loss] = []

    def note(self, loss: Loss) -> Action:
        """What to do about one more."""
        action = decide(loss, self._past, self.limits)
        # What has left the window will never count again: a run of weeks must not remember every worker.
        self._past = [past for past in self._past if loss.at - past.at <= self.limits.window_s] + [loss]
        self.counts[loss.kind] += not loss.expected
        return action
