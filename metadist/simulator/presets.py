"""Clusters whose numbers are known or assumed. All of them are to be measured anew where it matters."""

from __future__ import annotations

import os
from dataclasses import replace

from metadist.simulator.cluster import Cluster, Costs, Machine, Network

TWO_CORES = Cluster(
    Machine(
        cores=2, copy_bytes_per_s=9.39e9, sum_bytes_per_s=1.46e10,
        updates_per_s=5.23e8, threads=2, tcp_bytes_per_s=3.29e9,
    ),
    Network(),
    Costs(
        lease_s=0.825e-3, answer_s=0.825e-3, part_s=0.879e-3, step_s=4.18e-3, worker_s=5.03e-3,
        crowd_s=0.0228e-3, worker_part_s=2.03e-3, add_s=0.952e-3, commit_s=4.14e-3, message_s=0.00505e-3,
    ),
    source="measured on 2026-11-26 by tools/bench/simulate.py --calibrate: one machine, two cores, Ray 2.60",
)  # fmt: skip

_GPU_NODE = Machine(
    cores=64, copy_bytes_per_s=10e9, sum_bytes_per_s=10e9, updates_per_s=1.5e9, threads=8, tcp_bytes_per_s=2e9
)
_GPU_COSTS = Costs(
    lease_s=0.3e-3, answer_s=0.4e-3, part_s=0.15e-3, step_s=0.5e-3, worker_s=1.5e-3, add_s=0.4e-3, commit_s=0.7e-3,
    message_s=20e-6,
)  # fmt: skip

GPU_10G = Cluster(
    _GPU_NODE, Network(1.25e9, 100e-6), _GPU_COSTS, workers_per_node=8,
    source="assumed: nodes of eight GPUs and 64 cores, joined at 10 Gbit/s",
)  # fmt: skip
GPU_100G = replace(
    GPU_10G, network=Network(12.5e9, 30e-6), source="assumed: nodes of eight GPUs and 64 cores, joined at 100 Gbit/s"
)

PRESETS = {"two_cores": TWO_CORES, "gpu_10g": GPU_10G, "gpu_100g": GPU_100G}
"""By name."""


def this_machine() -> Cluster:
    """:data:`TWO_CORES` with as many cores as this machine has."""
    cores = os.cpu_count() or 1
    machine = replace(TWO_CORES.machine, cores=cores, threads=min(cores, 8))
    return replace(TWO_CORES, machine=machine)
