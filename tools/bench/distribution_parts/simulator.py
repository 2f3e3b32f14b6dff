"""What a step should take, by a model of its messages: to see whether anything costs more than it must."""

from __future__ import annotations

import heapq
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Seconds of what happens one after the other.

    Args:
        fixed: of a step, whatever the number of workers.
        message: of a lease and its answer together, at the driver and the server.
    """

    fixed: float
    message: float

    @classmethod
    def of(cls, few: tuple[int, float], many: tuple[int, float]) -> Costs:
        """From the seconds of a step that computes nothing with two numbers of workers."""
        message = max(0.0, (many[1] - few[1]) / (many[0] - few[0]))
        return cls(max(0.0, few[1] - few[0] * message), message)


def simulated_step(workers: int, seconds: float, costs: Costs) -> float:
    """Seconds of a step in which each worker computes one microbatch for ``seconds``.

    The driver hands out leases one by one, workers compute side by side, answers are taken one by one as they come.
    """
    half = costs.message / 2
    answers = [(i + 1) * half + seconds for i in range(workers)]
    heapq.heapify(answers)
    now = workers * half
    while answers:
        now = max(now, heapq.heappop(answers)) + half
    return now + costs.fixed
