"""The settings of our engine that are measured: a table to add lines to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tools.bench.adaptation_parts.workloads import Call, Job, Tensors, learner, microbatches, our_gradient


@dataclass(frozen=True)
class Setting:
    """One way to run the engine.

    Args:
        name: follows ``metadist/`` in the results.
        engine: fields of the config's ``engine`` section.
        together: tasks computed in one call; None for all of them.
        on: families of workloads it is measured on.
        quick: workloads it is measured on with ``--quick``: those on which its first call is short.
    """

    name: str
    engine: dict[str, Any] = field(default_factory=dict)
    together: int | None = 1
    on: str = "ABCDE"
    quick: tuple[str, ...] = ()

    @property
    def compiled(self) -> bool:
        return bool(self.engine.get("compile"))


_EAGER = {"strategy": "vectorised", "convolution": "direct"}
_COMPILED = {"strategy": "vectorised", "compile": True}
_COLUMNS = {**_COMPILED, "convolution": "columns"}
_DIRECT = {**_COMPILED, "convolution": "direct"}

SETTINGS: tuple[Setting, ...] = (
    Setting("adjoint", {"strategy": "adjoint", "convolution": "direct"}, 1, "ABCD", ("A1", "A5", "B1", "B5", "C")),
    Setting("adjoint-columns", {"strategy": "adjoint", "convolution": "columns"}, 1, "AB"),
    Setting("vectorised-4", _EAGER, 4, "ABC"),
    Setting("vectorised-4-columns", {**_EAGER, "convolution": "columns"}, 4, "AB"),
    Setting("vectorised-all", _EAGER, None, "DE", ("D1", "D5", "E")),
    Setting("compiled-1-direct", _DIRECT, 1, "ABC"),
    Setting("compiled-1", _COLUMNS, 1, "ABC"),
    Setting("compiled-2", _COLUMNS, 2, "AB"),
    Setting("compiled-4", _COLUMNS, 4, "ABC"),
    Setting("compiled-8", _COLUMNS, 8, "AB"),
    Setting("compiled-all", _COMPILED, None, "DE", ("D1", "D5")),
)


def make_ours(setting: Setting, job: Job) -> Call:
    """The meta-gradient of the job by our engine, microbatches and their sum included."""
    of = learner(job.workload, setting.engine, job.dtype)
    parts = microbatches(job.batch, setting.together)

    def call() -> Tensors:
        total = our_gradient(of, job.params, parts[0])
        for part in parts[1:]:
            more = our_gradient(of, job.params, part)
            total = {k: total[k] + more[k] for k in total}
        return total

    return call
