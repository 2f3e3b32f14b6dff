"""What a run's steps would take: the run's own controller over modelled workers, on a virtual clock."""

from metadist.simulator.cluster import (
    PARTS,
    Arrangement,
    Cluster,
    Compute,
    Costs,
    Deaths,
    Machine,
    Network,
    Work,
    without,
)
from metadist.simulator.run import Outcome, PlainPace, Split, simulate, split

__all__ = [
    "PARTS", "Arrangement", "Cluster", "Compute", "Costs", "Deaths", "Machine", "Network", "Outcome", "PlainPace",
    "Split", "Work", "simulate", "split", "without",
]  # fmt: skip
