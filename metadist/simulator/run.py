"""Runs the controller over a simulated backend, and says what its steps are made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from metadist.rounds import Round
from metadist.runtime.asynchronous import AsynchronousController
from metadist.runtime.controller import Controller
from metadist.runtime.leases import equal_shares
from metadist.runtime.pace import Pace
from metadist.simulator.allreduce import SimulatedAllReduce
from metadist.simulator.backend import SimulatedBackend
from metadist.simulator.cluster import PARTS, Arrangement, Cluster, Work, without
from metadist.staleness import Flow

WARM_UP, STEPS = 3, 3
_TIMEOUT_S = 1e6


class PlainPace(Pace):
    """Equal shares, and nothing is late before it hangs: steps without hedging, to compare with."""

    def shares(self, kind: str, microbatches: int, workers: Sequence[int]) -> list[int]:
        return equal_shares(microbatches, workers)

    def patience(self, kind: str, microbatches: int) -> float:
        return self.timeout_s


@dataclass(frozen=True)
class Outcome:
    """What was simulated.

    Args:
        step_s: seconds of an update, the mean.
        steps_s: of each.
        efficiency: computing that was of use, as a part of the workers' time.
        releases: leases given out a second time.
        left_out: microbatches that updates went on without, for each update.
        staleness: versions by which gradients lagged, the mean.
        dropped: gradients that were too old.
        deaths: of workers.
    """

    step_s: float
    steps_s: list[float]
    efficiency: float
    releases: int = 0
    left_out: float = 0.0
    staleness: float = 0.0
    dropped: int = 0
    deaths: int = 0


def simulate(
    work: Work, arrangement: Arrangement, cluster: Cluster, steps: int = STEPS, warm_up: int = WARM_UP
) -> Outcome:
    """Simulates ``warm_up`` steps, from which the controller learns the workers' pace, and the ``steps`` after them.

    Of updates that wait for nobody there are four times as many, since they settle down more slowly.
    """
    kind = SimulatedBackend if arrangement.topology == "server" else SimulatedAllReduce
    backend = kind(work, arrangement, cluster)
    controller = _controller(backend, arrangement, work)
    if arrangement.max_staleness:
        steps, warm_up = 4 * steps, 4 * warm_up
    ends = [0.0]
    results = []
    for version in range(warm_up + steps):
        result = controller.run(_round(version, work.count))
        backend.commit(version, result.tasks, result.slots)
        controller.committed()
        ends.append(backend.clock())
        results.append(result)
    results = results[warm_up:]
    took = [b - a for a, b in zip(ends[warm_up:], ends[warm_up + 1 :], strict=False)]
    step_s = statistics.fmean(took)
    left_out = statistics.fmean(len(r.left_out) for r in results)
    useful = work.compute.seconds * (work.count - left_out) / work.workers
    return Outcome(
        step_s, took, useful / step_s if step_s else 1.0, controller.releases, left_out,
        statistics.fmean(s for r in results for s in r.staleness or [0]), sum(len(r.dropped) for r in results),
        backend.deaths,
    )  # fmt: skip


def _round(version: int, count: int) -> Round:
    return Round("train", version, "train", "train", version * count, count, 1)


def _controller(backend: SimulatedBackend, arrangement: Arrangement, work: Work) -> Controller:
    clock = backend.clock
    if arrangement.max_staleness:
        flow = Flow(1 << 62, work.count, arrangement.max_staleness)
        return AsynchronousController(backend, flow, lease_timeout_s=_TIMEOUT_S, clock=clock)
    controller = Controller(backend, _TIMEOUT_S, clock=clock, quorum=arrangement.quorum)
    if not arrangement.duplicates:
        controller.pace = PlainPace(_TIMEOUT_S)
    return controller


@dataclass(frozen=True)
class Split:
    """A step, and what it is made of.

    Args:
        outcome: of the whole.
        seconds: of computing, and of each of :data:`~metadist.simulator.cluster.PARTS`; they add up to the step.
    """

    outcome: Outcome
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def binds(self) -> str:
        """What takes the most of a step."""
        return max(self.seconds, key=lambda part: self.seconds[part])

    @property
    def layer_s(self) -> float:
        """Seconds of everything but computing and those who compute slowly."""
        return math.fsum(s for part, s in self.seconds.items() if part not in ("compute", "stragglers"))


def split(work: Work, arrangement: Arrangement, cluster: Cluster, steps: int = STEPS, warm_up: int = WARM_UP) -> Split:
    """Simulates a step again and again, each time with one part more that costs nothing.

    A part's seconds are those that the step becomes shorter by, those before it having been taken away: what two parts
    do at the same time is told of the later one.
    """
    outcome = simulate(work, arrangement, cluster, steps, warm_up)
    left, seconds = outcome.step_s, {}
    for part in PARTS:
        work, cluster = without(part, work, cluster)
        now = min(left, simulate(work, arrangement, cluster, 1, warm_up).step_s)
        seconds[part], left = left - now, now
    return Split(outcome, {"compute": left, **seconds})
