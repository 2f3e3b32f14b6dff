"""The settings of our engine that are measured: a table to add lines to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tools.bench.adaptation_parts.workloads import WORKLOADS, Call, Job, Tensors, learner, microbatches, our_gradient


@dataclass(frozen=True)
class Setting:
    """One way to run the engine.

    Args:
        name: follows ``metadist/`` in the results.
        engine: fields of the config's ``engine`` section.
        together: tasks computed in one call; None for all of them.
        on: families of workloads it is measured on.
        where: kinds of device.
        quick: workloads it is measured on with ``--quick``: those on which its first call is short.
    """

    name: str
    engine: dict[str, Any] = field(default_factory=dict)
    together: int | None = 1
    on: str = "ABCDE"
    quick: tuple[str, ...] = ()
    where: tuple[str, ...] = ("cpu",)

    @property
    def compiled(self) -> bool:
        return bool(self.engine.get("compile"))


_PLAIN = {"strategy": "vectorised", "compile": False, "convolution": "direct", "fused_norm": False}
_EAGER = {"strategy": "vectorised", "compile": False, "convolution": "winograd"}
_TRACED = {"strategy": "vectorised", "compile": "trace", "convolution": "winograd"}
_LEAN = {**_TRACED, "recompute": True}
_COMPILED = {**_TRACED, "compile": True}
_GPU = {**_PLAIN, "compile": "trace", "convolution": "columns"}
_CONVOLUTIONAL = ("A1", "A5", "B1", "B5", "C")

SETTINGS: tuple[Setting, ...] = (
    Setting("adjoint-plain", {**_PLAIN, "strategy": "adjoint"}, 1, "ABCD"),
    Setting("vectorised-4-plain", _PLAIN, 4, "ABC"),
    Setting("vectorised-4", _EAGER, 4, "ABC"),
    Setting("vectorised-all", _EAGER, None, "DE", ("D1", "D5", "E")),
    Setting("traced-1", _TRACED, 1, "ABC", _CONVOLUTIONAL),
    Setting("traced-4", _TRACED, 4, "ABC", _CONVOLUTIONAL),
    Setting("traced-1-recompute", _LEAN, 1, "ABC"),
    Setting("traced-all", _TRACED, None, "DE", ("D1", "D5", "E")),
    Setting("compiled-4", _COMPILED, 4, "ABC"),
    Setting("compiled-all", _COMPILED, None, "DE", ("D1", "D5")),
    Setting("gpu-vectorised", _PLAIN, None, "ABCDE", tuple(WORKLOADS), where=("cuda",)),
    Setting("gpu-traced-direct", {**_PLAIN, "compile": "trace"}, None, "ABC", where=("cuda",)),
    Setting("gpu-traced", _GPU, None, "ABCDE", tuple(WORKLOADS), where=("cuda",)),
    Setting("gpu-compiled", {**_GPU, "compile": True}, None, "ABCDE", where=("cuda",)),
)


def make_ours(setting: Setting, job: Job) -> Call:
    """The meta-gradient of the job by our engine, microbatches and their sum included."""
    of = learner(job.workload, setting.engine, job.dtype, job.device)
    parts = microbatches(job.batch, setting.together)

    def call() -> Tensors:
        total = our_gradient(of, job.params, parts[0])
        for part in parts[1:]:
            more = our_gradient(of, job.params, part)
            total = {k: total[k] + more[k] for k in total}
        return total

    return call
